"use strict";
// Texts of rows and questions come into the page as text nodes alone: nothing of them is ever read as markup.
const at = (id) => document.getElementById(id);
let about = null;
let latest = 0;

function made(tag, text, kind) {
  const one = document.createElement(tag);
  if (text !== undefined) one.textContent = text;
  if (kind) one.className = kind;
  return one;
}

async function call(path, body) {
  const how = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const found = await fetch(path, how);
  const answer = await found.json();
  if (!found.ok) throw new Error(answer.error || found.statusText);
  return answer;
}

function say(text, wrong) {
  at("status").textContent = text;
  at("status").className = wrong ? "error" : "";
}

function shares(groups) {
  const out = made("div", undefined, "shares");
  for (const [name, share] of Object.entries(groups)) {
    const bar = made("span", undefined, share < 0 ? "bar less" : "bar");
    bar.style.width = `${Math.round(100 * Math.min(1, Math.abs(share)))}%`;
    out.append(made("span", name), bar, made("span", `${(100 * share).toFixed(0)} %`));
  }
  return out;
}

function row(one, question, withTokens) {
  const out = made("li");
  out.dataset.id = one.id;
  out.append(made("div", one.text || "(text not known)", "text"));
  const facts = made("div", undefined, "facts");
  facts.append(made("span", `row ${one.id}`));
  if (one.label) facts.append(made("span", `label ${one.label}`));
  facts.append(made("span", `${one.effect}, influence ${one.score.toPrecision(4)}`));
  const near = made("a", "neighbours");
  near.href = `#row=${encodeURIComponent(one.id)}`;
  facts.append(near);
  if (withTokens) {
    const button = made("button", "tokens it explains");
    button.type = "button";
    button.addEventListener("click", () => tokens(question, [one.id], `row ${one.id}`, latest));
    facts.append(button);
  }
  out.append(facts, shares(one.groups));
  return out;
}

async function tokens(question, ids, who, mine) {
  try {
    const found = await call("/api/tokens", { ...question, ids });
    if (mine !== latest) return;
    at("tokens-note").textContent = `Influence of ${who} on each token of the question, ${found.note}: blue helps, orange harms.`;
    const most = Math.max(1e-30, ...found.tokens.map((one) => Math.abs(one.influence)));
    at("tokens").replaceChildren(...found.tokens.map((one) => {
      const out = made("span", one.text, "token");
      out.title = one.influence.toPrecision(3);
      const colour = one.influence < 0 ? "--harm" : "--help";
      out.style.background = `rgba(var(${colour}), ${(0.6 * Math.abs(one.influence)) / most})`;
      if (one.influence < 0) out.style.textDecoration = "underline dotted";
      return out;
    }));
  } catch (error) {
    if (mine === latest) at("tokens-note").textContent = `Tokens: ${error.message}`;
  }
}

async function ask(question) {
  const mine = ++latest;
  const k = Number(at("k").value);
  say("Asking …");
  at("tokens").replaceChildren();
  at("tokens-note").textContent = "";
  try {
    const found = await call("/api/search", { ...question, k, method: at("method").value });
    // Whoever asks twice sees the answer to the second question.
    if (mine !== latest) return;
    at("asked").textContent = found.question.text + (found.question.label ? ` [${found.question.label}]` : "");
    for (const kind of ["helpful", "harmful"])
      at(kind).replaceChildren(...found[kind].map((one) => row(one, question, found.tokens)));
    at("answer-section").hidden = false;
    const how = found.exact ? "exact" : `recall@10 ${found.recall.toFixed(3)} when the index was built`;
    say(`${found.method}, ${how}, ${found.seconds.toFixed(2)} s`);
    const helpful = found.helpful.filter((one) => one.score > 0).map((one) => one.id);
    if (found.tokens && helpful.length) await tokens(question, helpful, "the helpful rows together", mine);
  } catch (error) {
    if (mine === latest) say(error.message, true);
  }
}

function fromAddress() {
  const name = new URLSearchParams(location.hash.slice(1)).get("row");
  if (name !== null) ask({ row: name });
}

async function begin() {
  try {
    about = await call("/api/about");
    const kind = about.task === "classification" ? "class-part" : "answer-part";
    at(kind).hidden = false;
    if (about.task !== "classification") at("text-label").textContent = "Prompt";
    at("class").replaceChildren(...about.classes.map((name, number) => new Option(name, String(number))));
    at("method").replaceChildren(...about.methods.map((name) => new Option(name, name, false, name === about.metric)));
    at("k").max = about.most_rows;
    at("text").maxLength = at("answer").maxLength = about.longest;
    at("about").textContent = `${about.rows.toLocaleString()} rows, ${about.layers.length} layers. ${about.note}`;
    if (about.queries) {
      const queries = await call("/api/queries?count=500");
      const options = queries.map((one) => new Option(`${one.name}: ${one.text.slice(0, 80)} [${one.label}]`, one.name));
      at("query").replaceChildren(new Option("choose", ""), ...options);
      at("query-part").hidden = false;
    }
    fromAddress();
  } catch (error) {
    say(error.message, true);
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = { text: at("text").value };
  if (about.task === "classification") question.label = at("class").value;
  else if (at("answer").value) question.answer = at("answer").value;
  history.replaceState(null, "", location.pathname);
  ask(question);
});
at("query").addEventListener("change", () => {
  if (at("query").value) ask({ query: at("query").value });
});
addEventListener("hashchange", fromAddress);
begin();
