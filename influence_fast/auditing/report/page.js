// The page: the list of samples, what opens beneath each, filters, keys. Texts come in as text nodes alone.

const data = JSON.parse(document.getElementById("data").textContent);
const decisions = new Decisions(`influence-fast review ${data.audit}`);
const BATCH = 60;
const NAMES = { keep: "Keep", relabel: "Relabel", drop: "Drop" };
const MARKS = { keep: "\u2713", relabel: "\u270e", drop: "\u2715" };
const $ = (id) => document.getElementById(id);
const percent = (value) => `${value > 0.99 && value < 1 ? ">99" : value < 0.01 && value > 0 ? "<1" : Math.round(100 * value)}%`;
const rowOf = new Map(data.rows.map((row) => [row.id, row]));
const other = new Map(data.others.map(([id, label, text]) => [id, { id, label, text }]));
const actions = data.relabel ? ACTIONS : ["keep", "drop"];
const itemOf = new Map();
let matching = [], shown = 0, current = null;

/** An element; children that are texts become text nodes, so that nothing in them is markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const isolated = (text, attributes = {}) => make("bdi", attributes, text);
const letters = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
const say = (text) => { $("said").textContent = text; };

// Decisions ------------------------------------------------------------------------------------------------------------

/** The label that a sample gets where nobody chose one: suggested, or predicted, or the only other one. */
function newLabel(row) {
  const made = decisions.get(row.id);
  if (made && made.action === "relabel") return made.label;
  const better = [row.suggested, row.predicted].find((label) => label !== undefined && label !== row.label);
  if (better !== undefined || data.relabel !== "label" || !data.labels) return better;
  const rest = data.labels.filter((label) => label !== row.label);
  return rest.length === 1 ? rest[0] : undefined;
}

/** True where the sample is now so decided; a label that must be chosen first is asked for. */
function decide(row, action, label = newLabel(row)) {
  const before = decisions.get(row.id), why = before ? before.why : "";
  if (action === "relabel" && !data.relabel) {
    say("These samples have no single label that could be changed.");
    return false;
  }
  if (action === "relabel" && label === undefined) {
    open(row, true);
    itemOf.get(row.id).querySelector(".new-label").focus();
    say(`Sample ${row.id}: choose its new label.`);
    return false;
  }
  decisions.change([[row.id, action ? decision(action, label, why) : undefined]]);
  update([row.id]);
  const what = action ? `${NAMES[action].toLowerCase()}${action === "relabel" ? ` as ${label}` : ""}` : "not decided";
  say(`Sample ${row.id}: ${what}.`);
  return true;
}

function decideAll(action) {
  const rows = matching.filter((row) => action !== "relabel" || newLabel(row) !== undefined);
  decisions.change(rows.map((row) => [row.id, decision(action, newLabel(row), (decisions.get(row.id) || {}).why)]));
  update(rows.map((row) => row.id));
  const left = matching.length - rows.length;
  say(`${count(rows.length, "sample")}: ${NAMES[action].toLowerCase()}.` + (left ? ` ${left} have no other label to get.` : ""));
}

function undo() {
  const ids = decisions.undo();
  if (!ids) return say("Nothing to undo.");
  update(ids);
  say(`Undone for ${ids.length === 1 ? `sample ${ids[0]}` : count(ids.length, "sample")}.`);
  if (ids.length === 1 && itemOf.has(ids[0])) focusOn(rowOf.get(ids[0]));
}

/** Show the decisions on these samples, and how many there are. */
function update(ids) {
  for (const id of ids) if (itemOf.has(id)) mark(itemOf.get(id), rowOf.get(id));
  const here = data.rows.filter((row) => decisions.get(row.id)).length, away = decisions.byId.size - here;
  $("progress").max = Math.max(1, data.rows.length);
  $("progress").value = here;
  $("decided").textContent = `${here.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} decided`
    + (away ? `, and ${away.toLocaleString("en")} not on this page` : "");
  $("undo").disabled = decisions.past.length === 0;
  $("export").disabled = decisions.byId.size === 0;
  $("unkept").hidden = decisions.kept;
}

function mark(item, row) {
  const made = decisions.get(row.id);
  item.dataset.decision = made ? made.action : "";
  for (const button of item.querySelectorAll(".decide button")) {
    button.setAttribute("aria-pressed", String(Boolean(made) && button.dataset.action === made.action));
  }
  const becomes = item.querySelector(".becomes");
  becomes.replaceChildren(...(made && made.action === "relabel" ? ["becomes ", isolated(made.label)] : []));
  const field = item.querySelector(".new-label");
  if (field) field.value = made && made.action === "relabel" ? made.label : "";
  const note = item.querySelector(".note");
  if (note) {
    note.value = made ? made.why : "";
    note.disabled = !made;
    note.placeholder = made ? "goes into the log" : "decide first";
  }
}

// One sample -------------------------------------------------------------------------------------------------------------

function build(row, number) {
  const item = make("li", { class: "sample", tabindex: "-1", "aria-labelledby": `name-${number}`, "aria-describedby": `text-${number}` });
  const toggle = make("button", { class: "open", "aria-expanded": "false", "aria-controls": `evidence-${number}`,
    "aria-label": `Evidence on sample ${row.id}`, onclick: () => open(row) }, "Evidence");
  const buttons = actions.map((action) => make("button", { "data-action": action, class: action, "aria-pressed": "false",
    onclick: () => decide(row, (decisions.get(row.id) || {}).action === action ? null : action) },
    make("span", { "aria-hidden": "true" }, MARKS[action]), ` ${NAMES[action]}`));
  item.append(
    make("div", { class: "place", title: "rank in scores.csv" }, String(row.place)),
    make("div", { class: "body" },
      make("p", { class: "text", id: `text-${number}`, dir: "auto", onclick: () => { if (!String(getSelection())) open(row); } }, row.text || "(no text)"),
      make("p", { class: "about" }, about(row, number), toggle)),
    make("div", { class: "chance" }, chance(row)),
    make("div", { class: "decide", role: "group", "aria-label": `Decision on sample ${row.id}` }, buttons,
      make("span", { class: "becomes" })),
    make("div", { class: "evidence", id: `evidence-${number}`, hidden: true }));
  item.addEventListener("focusin", () => setCurrent(row));
  itemOf.set(row.id, item);
  mark(item, row);
  return item;
}

function about(row, number) {
  const parts = [make("span", { class: "id", id: `name-${number}` }, "sample ", isolated(row.id))];
  if (row.label !== undefined) parts.push(make("span", {}, "labelled ", isolated(row.label, { class: "label" })));
  const better = row.suggested !== undefined ? row.suggested : row.predicted;
  if (better !== undefined && better !== row.label) {
    parts.push(make("span", {}, row.suggested !== undefined ? "suggested " : "model says ", isolated(better, { class: "label new" })));
  }
  if (row.kind) parts.push(make("span", { class: "kind" }, row.kind));
  if (row.noise !== undefined) parts.push(make("span", { class: row.noise ? "noisy" : "" }, row.noise ? "known to be bad" : "known to be good"));
  return parts;
}

/** How probable it is that the label is wrong; the score where nothing says so. */
function chance(row) {
  if (row.wrong === undefined) return [make("span", { class: "figure" }, short(row.score)), make("span", { class: "soft" }, "score")];
  return [make("span", { class: "figure" }, percent(row.wrong)), make("span", { class: "soft" }, "wrong"),
    make("span", { class: "gauge", "aria-hidden": "true" }, gauge(row.wrong))];
}

function gauge(share) {
  const bar = make("span");
  bar.style.width = `${100 * share}%`;
  return bar;
}

const short = (value) => (value === undefined ? "unknown" : String(Number(value.toPrecision(4))).replace("-", "\u2212"));

function open(row, wanted) {
  const item = itemOf.get(row.id), panel = item.querySelector(".evidence"), toggle = item.querySelector(".open");
  const opening = wanted === undefined ? panel.hidden : wanted;
  if (opening && !panel.hasChildNodes()) panel.append(...evidence(row, panel.id));
  panel.hidden = !opening;
  item.classList.toggle("opened", opening);
  toggle.setAttribute("aria-expanded", String(opening));
  mark(item, row);
}

function evidence(row, prefix) {
  const parts = [];
  if (row.reason) parts.push(make("p", { class: "reason" }, row.reason));
  // Tokens may be numbers, or only the beginning.
  if (!row.tokens || !letters(row.tokens.map(([text]) => text).join("")).includes(letters(row.text))) {
    parts.push(make("p", { class: "full", dir: "auto" }, row.text || "(no text)"));
  }
  if (row.tokens) parts.push(...tokens(row.tokens));
  if (row.more) parts.push(make("p", { class: "soft" }, `${count(row.more, "more character")} in the data.`));
  parts.push(make("div", { class: "fields" }, fields(row, prefix)));
  const groups = [["Similar samples with another label", row.neighbours, "similarity"], ["Queries that it hurts most", row.hurts, "influence"],
    ["Queries that it helps most", row.helps, "influence"],
    [row.copies > 8 ? `The same, 8 of ${row.copies}` : "The same or nearly the same", (row.duplicates || []).map((id) => ({ id })), null]];
  parts.push(make("div", { class: "groups" }, groups.filter(([, found]) => found && found.length).map((group) => related(...group))));
  const facts = [["Score", short(row.score)], ["Loss", short(row.loss)], ["Model says", row.predicted], ["Suggested", row.suggested],
    ["Label right", row.right === undefined ? undefined : percent(row.right)],
    [row.calibrated ? "Label wrong, calibrated" : "Label wrong, not calibrated", row.wrong === undefined ? undefined : percent(row.wrong)]];
  parts.push(make("dl", { class: "numbers" }, facts.filter(([, value]) => value !== undefined)
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, isolated(value))))));
  return parts;
}

/** The label that it gets, and a note that `clean` writes to its log. */
function fields(row, prefix) {
  const parts = [];
  if (data.relabel) {
    const choices = data.labels && [make("option", { value: "" }, "choose\u2026"),
      ...data.labels.filter((label) => label !== row.label).map((label) => make("option", { value: label }, label))];
    const field = choices ? make("select", { class: "new-label", id: `${prefix}-label` }, choices)
      : make(data.relabel === "text" ? "textarea" : "input", { class: "new-label", id: `${prefix}-label`, dir: "auto" });
    field.addEventListener("change", () => decide(row, field.value === "" ? null : "relabel", field.value));
    parts.push(make("label", { for: field.id }, data.relabel === "text" ? "New answer" : "New label", field));
  }
  const note = make("input", { class: "note", id: `${prefix}-note`, dir: "auto" });
  note.addEventListener("change", () => {
    const { action, label } = decisions.get(row.id);
    decisions.change([[row.id, decision(action, label, note.value)]]);
    update([row.id]);
  });
  return [...parts, make("label", { for: note.id }, "Note", note)];
}

function related(title, found, measure) {
  return make("section", {}, make("h3", {}, title), make("ul", {}, found.map((item) => {
    const known = rowOf.get(item.id) || other.get(item.id) || {};
    const text = measure === "influence" ? item.text : item.text || known.text, label = item.label !== undefined ? item.label : known.label;
    return make("li", {},
      make("span", { class: "about" }, isolated(item.id, { class: "id" }), label != null ? isolated(label, { class: "label" }) : null,
        measure && item[measure] !== undefined ? make("span", { class: "soft" }, `${measure} ${short(item[measure])}`) : null),
      text ? make("span", { class: "related", dir: "auto" }, text.length > 240 ? `${text.slice(0, 240)}\u2026` : text) : null);
  })));
}

/** Harmful spans are underlined, helpful ones dotted, so that colour is not all there is. */
function tokens(found) {
  const most = Math.max(...found.map(([, influence]) => Math.abs(influence))) || 1;
  const apart = !found.slice(1).some(([text]) => /^\s|\s$|^[\u0120\u2581]/.test(text));
  const words = found.map(([text, influence], i) => {
    const shown = apart && text.startsWith("##") ? text.slice(2) : text.replace(/[\u0120\u2581]/g, " ").replace(/\u010a/g, "\n");
    const level = Math.round(4 * Math.abs(influence) / most);
    const token = make("span", level ? { class: `token ${influence < 0 ? "harms" : "helps"} level-${level}`, title: `influence ${short(influence)}` } : {}, shown);
    return apart && i && !text.startsWith("##") ? [" ", token] : [token];
  });
  return [make("p", { class: "full", dir: "auto" }, words),
    make("p", { class: "soft legend" }, make("span", { class: "token harms level-3" }, "harms"), " the queries, ", make("span", { class: "token helps level-3" }, "helps"), " them")];
}

// The list ---------------------------------------------------------------------------------------------------------------

const ORDERS = [
  ["Most harmful first", (a, b) => a.place - b.place, () => true],
  ["Most probably wrong first", (a, b) => b.wrong - a.wrong, (row) => row.wrong !== undefined],
  ["Highest loss first", (a, b) => b.loss - a.loss, (row) => row.loss !== undefined],
  ["By label", (a, b) => data.labels ? data.labels.indexOf(a.label) - data.labels.indexOf(b.label) : 0, (row) => row.label !== undefined],
  ["By id", (a, b) => a.id.localeCompare(b.id, "en", { numeric: true }), () => true],
  ["Longest text first", (a, b) => b.text.length + (b.more || 0) - a.text.length - (a.more || 0), (row) => row.text],
];

function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), least = Number($("least").value) / 100;
  const [label, kind, made] = ["by-label", "by-kind", "by-decision"].map((id) => $(id).value);
  $("least-shown").textContent = `${Math.round(100 * least)}%`;
  matching = data.rows.filter((row) => {
    const action = (decisions.get(row.id) || {}).action || "none";
    return (!label || row.label === label.slice(1)) && (!kind || row.kind === kind.slice(1)) && (!made || made === action || (made === "any" && action !== "none"))
      && (!least || row.wrong >= least) && words.every((word) => row.searched.includes(word));
  });
  const [, compare] = ORDERS[$("order").value];
  matching.sort((a, b) => compare(a, b) || a.place - b.place);
  $("list").replaceChildren();
  itemOf.clear();
  shown = 0;
  current = null;
  more();
  $("bulk").hidden = matching.length === 0;
  $("bulk").firstElementChild.textContent = `Decide all ${matching.length.toLocaleString("en")}:`;
}

/** The next samples of those that match. */
function more(upTo = shown + BATCH) {
  const next = matching.slice(shown, upTo);
  $("list").append(...next.map((row, i) => build(row, shown + i)));
  if (shown === 0 && next.length) itemOf.get(next[0].id).tabIndex = 0;
  shown += next.length;
  $("more").hidden = shown === matching.length;
  $("count").textContent = matching.length === data.rows.length ? count(matching.length, "sample")
    : matching.length ? `${count(matching.length, "sample")} of ${data.rows.length.toLocaleString("en")} match` : "No sample matches these filters.";
}

function setCurrent(row) {
  const before = current && itemOf.get(current.id), first = $("list").firstElementChild;
  for (const item of [before, first]) if (item) item.tabIndex = -1;
  if (before) before.removeAttribute("aria-current");
  current = row;
  itemOf.get(row.id).tabIndex = 0;
  itemOf.get(row.id).setAttribute("aria-current", "true");
}

function focusOn(row) {
  itemOf.get(row.id).focus();
  itemOf.get(row.id).scrollIntoView({ block: "nearest" });
}

function move(step) {
  if (!matching.length) return;
  const to = current ? Math.min(matching.length - 1, Math.max(0, matching.indexOf(current) + step)) : 0;
  if (to >= shown) more();
  focusOn(matching[to]);
}

// What stands around it -----------------------------------------------------------------------------------------------------

function openHelp() {
  $("help").showModal();
  $("close-help").focus();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || $("help").open || $("review").hidden) return;
  if (event.target.id === "search" && event.key === "Enter") return move(0);
  if (event.target.closest("input, select, textarea")) return;
  if (event.key === "Enter") {
    if (current && event.target === itemOf.get(current.id)) open(current);
    return;
  }
  if (event.key === "?") openHelp();
  if (event.key === "?" || !$("keys-on").checked) return;
  const inList = event.target.closest(".sample");
  const acts = { 0: null, 1: "keep", 2: "relabel", 3: "drop" };
  if (event.key in acts) {
    if (!current) move(0);
    else if (decide(current, acts[event.key]) && acts[event.key]) move(1);
  } else if (event.key === "j" || (inList && event.key === "ArrowDown")) move(1);
  else if (event.key === "k" || (inList && event.key === "ArrowUp")) move(-1);
  else if (event.key === "u") undo();
  else if (event.key === "/") $("search").focus();
  else return;
  event.preventDefault();
}

function exportReview() {
  const blob = new Blob([decisions.csv(data.rows.map((row) => row.id))], { type: "text/csv;charset=utf-8" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "review.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${count(decisions.byId.size, "decision")} exported. Next: influence-fast clean AUDIT --decisions review.csv --out cleaned.jsonl`);
}

async function importReview(event) {
  const file = event.target.files[0];
  if (!file) return;
  const { changes, problems } = readReview(await file.text(), data.labels);
  event.target.value = "";
  decisions.change(changes);
  const away = changes.filter(([id]) => !rowOf.has(id)).length;
  update([...itemOf.keys()]);
  say(`${count(changes.length, "decision")} imported` + (away ? `, ${away} of them on samples that are not on this page` : "")
    + (problems.length ? `; ${count(problems.length, "row")} not: ${problems.slice(0, 3).join("; ")}` : "") + ".");
}

function selectTab(tab, focused) {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const chosen = button === tab;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
    $(button.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focused) tab.focus();
}

function setUp() {
  for (const row of data.rows) {
    row.text = row.text || "";
    row.searched = [row.id, row.label, row.suggested, row.text].filter(Boolean).join("\n").toLowerCase();
  }
  const tabs = [...document.querySelectorAll("[role=tab]")];
  $("tabs").hidden = false;
  selectTab(tabs[0]);
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => selectTab(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
      if (to !== undefined) selectTab(tabs.at(to % tabs.length), true);
    });
  });
  // A value begins with "=", so that an empty label is not "all".
  const options = (select, all, values) => select.append(make("option", { value: "" }, all), ...values.map((value) => make("option", { value: `=${value}` }, value)));
  options($("by-label"), "all", (data.labels || []).filter((label) => data.rows.some((row) => row.label === label)));
  options($("by-kind"), "all", [...new Set(data.rows.map((row) => row.kind).filter(Boolean))].sort());
  $("by-decision").append(...[["", "all"], ["none", "not decided"], ["any", "decided"], ...actions.map((action) => [action, NAMES[action].toLowerCase()])]
    .map(([value, name]) => make("option", { value }, name)));
  $("order").append(...ORDERS.map(([name], i) => [name, i]).filter(([, i]) => data.rows.some(ORDERS[i][2])).map(([name, i]) => make("option", { value: i }, name)));
  $("by-label").parentElement.hidden = $("by-label").length < 3;
  $("by-kind").parentElement.hidden = $("by-kind").length < 2;
  $("least").parentElement.hidden = !data.rows.some((row) => row.wrong !== undefined);
  $("filters").open = matchMedia("(min-width: 48rem)").matches;
  $("bulk").append(...actions.map((action) => make("button", { onclick: () => decideAll(action) }, NAMES[action])));
  $("rest").textContent = data.total > data.rows.length
    ? `This page holds the ${count(data.rows.length, "most harmful sample")} of ${data.total.toLocaleString("en")}; the rest is in scores.csv.` : "";
  for (const id of ["search", "least"]) $(id).addEventListener("input", filter);
  for (const id of ["order", "by-label", "by-kind", "by-decision"]) $(id).addEventListener("change", filter);
  $("clear").addEventListener("click", () => {
    for (const id of ["search", "by-label", "by-kind", "by-decision"]) $(id).value = "";
    $("least").value = 0;
    filter();
  });
  $("show-more").addEventListener("click", () => {
    const from = shown;
    more();
    focusOn(matching[from]);
  });
  new IntersectionObserver((seen) => { if (seen[0].isIntersecting && shown < matching.length) more(); }, { rootMargin: "600px" }).observe($("more"));
  $("undo").addEventListener("click", undo);
  $("export").addEventListener("click", exportReview);
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", importReview);
  $("keys").addEventListener("click", openHelp);
  $("close-help").addEventListener("click", () => $("help").close());
  document.addEventListener("keydown", onKey);
  // Another window on the same audit.
  addEventListener("storage", (event) => {
    if (event.key !== decisions.key) return;
    decisions.load();
    decisions.past = [];
    update([...itemOf.keys()]);
  });
  addEventListener("beforeunload", (event) => { if (!decisions.kept && decisions.byId.size) event.preventDefault(); });
  update([]);
  filter();
}

setUp();
