"use strict";
// Everything from the results is put in as text, never as markup: what a model wrote is not to be trusted.
const { rules, pieces, items } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20, ROWS = 20, CONTEXT = 40;
const KINDS = { a: "accepted: the target agrees", r: "let through by the rule alone", t: "the target's own token",
                b: "the target's own token, after all draft tokens of the round were accepted", "?": "not known who accepted it" };
const RESULTS = { "-1": ["", "not scored"], 0: ["wrong", "✗ wrong"], 1: ["right", "✓ right"] };
const $ = (id) => document.getElementById(id);
let state = {}, found = [], tokens = [], shown = { items: 0, tokens: 0 };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function mark(rule) {
  return $("marks").content.children[rule].cloneNode(true);
}

const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const textOf = (answer) => answer.text ??= answer.t.map((id) => pieces[id]).join("");
const thousandths = (x) => (x / 1000).toFixed(3);  // p, kl and s are kept so, in few characters
const probability = (x) => x >= 1 || x === 0 ? thousandths(x) : (x / 1000).toExponential(1);

// The state of the page is its address, so that a view can be linked: #rule=judge&wrong=1&only=rule&q=text&item=3&at=17
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { rule: rules.indexOf(given.get("rule")), result: ["right", "wrong", "lost"].find((key) => given.has(key)) ?? "",
            only: given.get("only") === "rule", all: given.has("all"), q: given.get("q") ?? "", sort: given.get("sort") ?? "p",
            item: given.get("item"), at: given.get("at"), view: given.get("view") };
  for (const id of ["result", "q", "sort"]) $(id).value = state[id];
  if (!$("sort").value) $("sort").value = state.sort = "p";
  $("rule").value = state.rule;
  for (const id of ["only", "all"]) $(id).checked = state[id];
  render();
}

function writeAddress() {
  const now = new URLSearchParams(), rule = Number($("rule").value);
  if (rule >= 0) now.set("rule", rules[rule]);
  if ($("result").value) now.set($("result").value, 1);
  if ($("only").checked) now.set("only", "rule");
  if ($("all").checked) now.set("all", 1);
  if ($("q").value) now.set("q", $("q").value);
  if ($("sort").value !== "p") now.set("sort", $("sort").value);
  history.replaceState(null, "", "#" + now);
  readAddress();
}

function matches(item, answer, words) {
  if (state.rule >= 0 && answer.r !== state.rule) return false;
  if (state.result === "lost" && !(answer.ok === 0 && item.plain === 1)) return false;
  if (state.result === "right" && answer.ok !== 1 || state.result === "wrong" && answer.ok !== 0) return false;
  if (state.only && !answer.o.includes("r")) return false;
  return !words || item.q.toLowerCase().includes(words) || textOf(answer).toLowerCase().includes(words);
}

function render() {
  hideTip();
  const words = state.q.toLowerCase();
  found = [], tokens = [];
  let answers = 0, withRule = 0;
  for (const item of items) {
    if (state.item !== null && item.i !== state.item) continue;
    const good = item.a.filter((answer) => matches(item, answer, words));
    if (!good.length) continue;
    answers += good.length;
    found.push({ item, good });
    for (const answer of good) {
      const before = tokens.length;
      for (let at = answer.o.indexOf("r"); at >= 0; at = answer.o.indexOf("r", at + 1)) tokens.push({ item, answer, at });
      withRule += tokens.length > before;
    }
  }
  const key = { p: (x) => x.answer.p?.[x.at] ?? 2000, score: (x) => x.answer.s?.[x.at] ?? 2000,
                kl: (x) => -(x.answer.kl?.[x.at] ?? -1), place: () => 0 }[state.sort] ?? (() => 0);
  tokens.sort((one, other) => key(one) - key(other));  // stable: equals stay as answered
  const all = items.reduce((sum, item) => sum + item.a.length, 0);
  $("status").textContent = `${answers} of ${count(all, "answer")}, ${found.length} of ${count(items.length, "question")}`;
  $("spot-status").textContent = tokens.length
    ? `${count(tokens.length, "token")} in ${count(withRule, "answer")}` : "No such token in these answers.";
  document.body.classList.toggle("only", state.only);
  $("items").replaceChildren(...(found.length ? [] : [make("p", {}, "No answer matches these filters.")]));
  $("tokens").replaceChildren();
  shown = { items: 0, tokens: 0 };
  moreItems();
  moreTokens();
  measureBar();  // its status may have made it a line higher
  if (state.item !== null) showPlace();
  if (["summary", "figures", "spot", "answers"].includes(state.view)) $(state.view).scrollIntoView();
}

function showPlace() {
  const place = $("items").querySelector(`[data-at="${Number(state.at ?? -1)}"]`);
  if (place) place.classList.add("here");
  (place ?? $("answers")).scrollIntoView({ block: place ? "center" : "start" });
  if (place) focusToken(place);
}

function moreItems() {
  for (const { item, good } of found.slice(shown.items, shown.items + PAGE)) $("items").append(articleOf(item, good));
  shown.items += PAGE;
  $("more-items").hidden = shown.items >= found.length;
}

function moreTokens() {
  for (const token of tokens.slice(shown.tokens, shown.tokens + ROWS)) $("tokens").append(rowOf(token));
  shown.tokens += ROWS;
  $("more-tokens").hidden = shown.tokens >= tokens.length;
}

function linkTo(item, answer, at) {
  return "#" + new URLSearchParams({ item: item.i, rule: rules[answer.r], ...(at === undefined ? {} : { at }) });
}

function articleOf(item, good) {
  const title = make("h3", {}, make("a", { href: "#" + new URLSearchParams({ item: item.i }) }, `Item ${item.i}`));
  if (item.f) title.append(" ", make("span", { class: "soft" }, item.f));
  const article = make("article", { "data-item": item.i }, title, make("p", { class: "question" }, item.q));
  for (const answer of state.all ? item.a : good) article.append(sectionOf(item, answer));
  return article;
}

function sectionOf(item, answer) {
  const [kind, name] = RESULTS[answer.ok], byRule = answer.o.split("r").length - 1;
  const title = make("h4", {}, mark(answer.r), ` ${rules[answer.r]} `, make("span", { class: kind }, name));
  const more = [answer.f === null ? "" : `final answer ${answer.f}`, answer.m === null ? "" : `m* ${answer.m}`,
                byRule ? `${byRule} of ${answer.o.length} tokens by the rule alone` : ""].filter((x) => x);
  if (more.length) title.append(" ", make("span", { class: "soft" }, more.join(", ")));
  const text = make("div", { class: "text", role: "group", "aria-label": `answer by ${rules[answer.r]}, token by token` });
  answer.t.forEach((id, at) => {
    const span = make("span", { class: answer.o[at] === "?" ? "" : answer.o[at], "data-at": at, tabindex: at ? -1 : 0 },
                      pieces[id] || (at + 1 === answer.t.length ? "■" : "▯"));
    if (answer.turns.includes(at)) span.classList.add("turn");
    if (answer.o[at] !== "a" && /^\n+$/.test(pieces[id])) span.prepend("↵");
    text.append(span);
  });
  text.answer = answer;
  return make("section", {}, title, text);
}

function rowOf({ item, answer, at }) {
  const piece = (i) => pieces[answer.t[i]] ?? "", join = (from, to) => answer.t.slice(from, to).map((id) => pieces[id]).join("");
  const number = (name, text) => make("td", { class: "n", "data-name": name }, text ?? "-"), [kind, name] = RESULTS[answer.ok];
  return make("tr", {},
    make("td", {}, make("a", { href: linkTo(item, answer, at) }, `item ${item.i}, token ${at + 1}`)),
    make("td", {}, mark(answer.r), " " + rules[answer.r]), make("td", { class: kind }, name),
    make("td", { class: "context" }, "…" + join(0, at).slice(-CONTEXT), make("span", { class: "r" }, piece(at) || "▯"),
         join(at + 1).slice(0, CONTEXT) + "…"),
    make("td", { "data-name": "the target's own" }, topOf(answer, at) ?? "-"),
    number("probability", answer.p && probability(answer.p[at])),
    number("KL divergence", answer.kl && thousandths(answer.kl[at])), number("score", answer.s && thousandths(answer.s[at])));
}

const topOf = (answer, at) => !answer.p ? undefined : at in answer.top ? JSON.stringify(pieces[answer.top[at]]) : "the same";

function tipText(answer, at) {
  const lines = [JSON.stringify(pieces[answer.t[at]]) + ": " + KINDS[answer.o[at]]];
  if (!answer.p) return lines.concat("no figures; run evaluate.py with --details").join("\n");
  lines.push(`target's probability ${probability(answer.p[at])}, KL(target, draft) ${thousandths(answer.kl[at])}`);
  lines.push(answer.s ? `judge's score ${thousandths(answer.s[at])}` : "no judge");
  lines.push(`the target's most likely token: ${topOf(answer, at)}`);
  return lines.join("\n");
}

function showTip(span) {
  const tip = $("tip"), box = span.getClientRects()[0];
  if (!box) return;
  tip.textContent = tipText(span.parentNode.answer, Number(span.dataset.at));
  tip.hidden = false;
  const left = Math.max(0, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 4));
  const below = box.bottom + tip.offsetHeight + 6 < innerHeight;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${scrollY + (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6)}px`;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  span.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  $("tip").hidden = true;
}

const tokenAt = (target) => target instanceof Element ? target.closest(".text span") : null;

function focusToken(span) {
  for (const other of span.parentNode.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  span.tabIndex = 0;
  span.focus({ preventScroll: true });
  showTip(span);
}

function moveByKey(event) {
  if (event.key === "Escape") hideTip();
  const span = tokenAt(event.target);
  if (!span || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...span.parentNode.children], at = all.indexOf(span), rule = (x) => x.classList.contains("r");
  const next = { ArrowRight: () => all[at + 1], ArrowLeft: () => all[at - 1], Home: () => all[0], End: () => all.at(-1),
                 n: () => all.slice(at + 1).find(rule), p: () => all.slice(0, at).findLast(rule) }[event.key]?.();
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView({ block: "nearest" });
  focusToken(next);
}

$("rule").append(make("option", { value: -1 }, "all"), ...rules.map((rule, i) => make("option", { value: i }, rule)));
for (const id of ["rule", "result", "only", "all", "sort"]) $(id).addEventListener("change", writeAddress);
let pause;
$("q").addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(writeAddress, 200); });
$("reset").addEventListener("click", () => { history.replaceState(null, "", "#"); readAddress(); });
$("more-items").addEventListener("click", moreItems);
$("more-tokens").addEventListener("click", moreTokens);
$("items").addEventListener("mouseover", (event) => { const span = tokenAt(event.target); if (span) showTip(span); });
$("items").addEventListener("mouseout", hideTip);
$("items").addEventListener("focusin", (event) => { const span = tokenAt(event.target); if (span) showTip(span); });
$("items").addEventListener("focusout", hideTip);
$("items").addEventListener("click", (event) => { const span = tokenAt(event.target); if (span) focusToken(span); });
document.addEventListener("keydown", moveByKey);
addEventListener("hashchange", readAddress);
const bar = document.querySelector(".filters");
function measureBar() {  // what a link leads to must not lie under it
  const height = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
  document.documentElement.style.setProperty("--bar", `${height}px`);
}
new ResizeObserver(measureBar).observe(bar);
new IntersectionObserver(([entry]) => { if (entry.isIntersecting && shown.items < found.length) moreItems(); })
  .observe($("more-items"));
readAddress();
