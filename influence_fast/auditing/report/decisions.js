// What a person decided: kept in the browser, undone, and read and written as the CSV that `clean --decisions` takes.

const ACTIONS = ["keep", "relabel", "drop"];
// As influence_fast/_csv.py: cells that a spreadsheet would run get an apostrophe, which readers take off again.
const FORMULA = /^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;
const COLUMNS = ["id", "decision", "label", "why"];

/** Decisions by id, in a Map: an id may be any text, `__proto__` too. */
class Decisions {
  constructor(key) {
    this.key = key;
    this.byId = new Map();
    this.past = [];
    this.kept = true;
    this.load();
  }

  load() {
    try {
      const found = JSON.parse(localStorage.getItem(this.key) || "[]");
      this.byId = new Map(found.filter(([id, made]) => typeof id === "string" && ACTIONS.includes(made.action)));
    } catch {
      this.kept = this.works();
    }
  }

  /** Whether this browser keeps anything: it may be full, or told not to. */
  works() {
    try {
      localStorage.setItem(`${this.key} test`, "1");
      localStorage.removeItem(`${this.key} test`);
      return true;
    } catch {
      return false;
    }
  }

  get(id) {
    return this.byId.get(id);
  }

  /** Several changes, `[id, decision or undefined]`, that are undone as one. */
  change(changes) {
    const before = changes.map(([id]) => [id, this.byId.get(id)]);
    this.past.push(before);
    this.apply(changes);
  }

  /** Take the last change back; the ids it concerned, or null where there is none. */
  undo() {
    const before = this.past.pop();
    if (!before) return null;
    this.apply(before.reverse());
    return before.map(([id]) => id);
  }

  apply(changes) {
    for (const [id, made] of changes) {
      if (made) this.byId.set(id, made);
      else this.byId.delete(id);
    }
    try {
      localStorage.setItem(this.key, JSON.stringify([...this.byId]));
      this.kept = true;
    } catch {
      this.kept = false;
    }
  }

  /** The file for `clean --decisions`; `order` gives the ids that come first. */
  csv(order) {
    const first = new Set(order);
    const ids = [...order.filter((id) => this.byId.has(id)), ...[...this.byId.keys()].filter((id) => !first.has(id))];
    const lines = ids.map((id) => {
      const made = this.byId.get(id);
      return [id, made.action, made.action === "relabel" ? made.label : "", made.why || ""];
    });
    return [COLUMNS, ...lines].map((cells) => cells.map(csvCell).join(",") + "\r\n").join("");
  }
}

function csvCell(text) {
  const safe = FORMULA.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** Rows of cells, by RFC 4180; a line without any text is no row. Throws where a quote is never closed. */
function csvRows(text) {
  const rows = [];
  let row = [], cell = "", quoted = false;
  const source = text.replace(/^\ufeff/, "");
  for (let i = 0; i <= source.length; i++) {
    const c = source[i];
    if (quoted) {
      if (c === undefined) throw new Error("a quoted cell is never closed");
      if (c !== '"') cell += c;
      else if (source[i + 1] === '"') cell += source[++i];
      else quoted = false;
    } else if (c === '"' && cell === "") quoted = true;
    else if (c === "," || c === "\n" || c === "\r" || c === undefined) {
      row.push(cell);
      cell = "";
      if (c === ",") continue;
      if (c === "\r" && source[i + 1] === "\n") i++;
      if (row.length > 1 || row[0] !== "") rows.push(row);
      row = [];
    } else cell += c;
  }
  return rows;
}

/** `{changes, problems}` of a review that was exported before, or written by hand; `labels` are all there are, if known. */
function readReview(text, labels) {
  let rows;
  try {
    rows = csvRows(text);
  } catch (error) {
    return { changes: [], problems: [`no CSV: ${error.message}`] };
  }
  const header = (rows.shift() || []).map((name) => name.trim());
  const at = Object.fromEntries(COLUMNS.map((name) => [name, header.indexOf(name)]));
  const lacking = ["id", "decision"].filter((name) => at[name] < 0);
  if (lacking.length) return { changes: [], problems: [`no column ${lacking[0]}; expected ${COLUMNS.join(", ")}`] };
  const changes = [], problems = [];
  rows.forEach((row, number) => {
    const cell = (name) => {
      const text = row[at[name]] || "";
      return text.startsWith("'") && FORMULA.test(text) ? text.slice(1) : text;
    };
    const action = cell("decision").trim().toLowerCase();
    if (!action) return;
    if (!ACTIONS.includes(action)) problems.push(`row ${number + 1}: expected ${ACTIONS.join(", ")}, got ${action}`);
    else if (action === "relabel" && !cell("label")) problems.push(`row ${number + 1}: relabel needs a label`);
    else if (action === "relabel" && labels && !labels.includes(cell("label"))) problems.push(`row ${number + 1}: no sample has the label ${cell("label")}`);
    else changes.push([cell("id"), decision(action, cell("label"), cell("why"))]);
  });
  return { changes, problems };
}

function decision(action, label, why) {
  return { action, label: action === "relabel" ? label : "", why: why || "" };
}
