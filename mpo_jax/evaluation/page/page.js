// Asks the server what to judge, shows it as text, sends back what was chosen. Judgements live on the server alone:
// a page that is loaded again goes on with the first item that its annotator has not judged.
"use strict";

const $ = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "first", a: "first", ArrowRight: "second", b: "second", t: "tie" };
let annotator = localStorage.getItem("annotator") || "";
let number = null; // of the item on the page
let before = []; // numbers of the items that the annotator has judged, the latest last; the server knows them
let shownAt = 0;
let busy = false; // from a choice until the next item is there, so that no key press counts twice

function show(part) {
  for (const name of ["sign-in", "task", "finished"]) $(name).hidden = name !== part;
}

function problem(words) {
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

async function call(path, options) {
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function once(work) {
  if (busy) return;
  busy = true;
  for (const button of document.querySelectorAll(".choice")) button.disabled = true;
  try {
    await work();
    problem("");
  } catch (error) {
    problem(`That did not work: ${error.message}. Try again.`);
  } finally {
    busy = false;
    for (const button of document.querySelectorAll(".choice")) button.disabled = false;
  }
}

async function load(wanted) {
  const query = new URLSearchParams({ annotator });
  if (wanted !== null) query.set("number", wanted);
  const task = await call(`/api/task?${query}`);
  number = task.number;
  before = task.before;
  $("bar").style.width = `${(100 * task.done) / task.total}%`;
  $("progress").setAttribute("aria-valuemax", task.total);
  $("progress").setAttribute("aria-valuenow", task.done);
  $("count").textContent = `${task.done} of ${task.total} judged`;
  $("who").textContent = `as ${annotator}`;
  $("leave").hidden = false;
  if (number === null) return show("finished");
  $("question").textContent = task.question;
  $("prompt").textContent = task.prompt;
  $("reply-first").textContent = task.replies[0];
  $("reply-second").textContent = task.replies[1];
  $("comment").value = task.comment;
  for (const name of ["first", "second", "tie"]) $(name).classList.toggle("chosen", task.choice === name);
  $("back").disabled = before.length === 0 || before[0] === number;
  $("forward").disabled = $("withdraw").disabled = task.choice === null;
  show("task");
  for (const name of ["prompt", "reply-first", "reply-second"]) $(name).scrollTop = 0;
  window.scrollTo(0, 0);
  if (document.activeElement) document.activeElement.blur();
  shownAt = performance.now();
}

const send = (path, content) => call(path, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ annotator, number, ...content }),
});

const choose = (choice) => once(async () => {
  await send("/api/judgement", {
    choice, comment: $("comment").value, seconds: (performance.now() - shownAt) / 1000,
  });
  await load(null);
});

const withdraw = () => once(async () => {
  await send("/api/withdrawal", {});
  await load(number);
});

const back = () => once(async () => {
  const at = before.indexOf(number);
  const wanted = at < 0 ? before.at(-1) : before[at - 1];
  if (wanted !== undefined) await load(wanted);
});

const forward = () => once(() => load(null));

function signIn() {
  annotator = "";
  $("who").textContent = $("count").textContent = "";
  $("leave").hidden = true;
  show("sign-in");
  $("name").focus();
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = $("name").value.trim();
  localStorage.setItem("annotator", annotator);
  once(() => load(null));
});
$("leave").addEventListener("click", signIn);
for (const choice of ["first", "second", "tie"]) $(choice).addEventListener("click", () => choose(choice));
$("back").addEventListener("click", back);
$("review").addEventListener("click", back);
$("forward").addEventListener("click", forward);
$("withdraw").addEventListener("click", withdraw);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (!$("finished").hidden && event.key.toLowerCase() === "u") return void back();
  if ($("task").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS) {
    event.preventDefault();
    choose(KEYS[key]);
  } else if (key === "c") {
    event.preventDefault();
    $("comment").focus();
  } else if (key === "u" && !$("back").disabled) back();
  else if (key === "n" && !$("forward").disabled) forward();
  else if (key === "z" && !$("withdraw").disabled) withdraw();
});

if (annotator) once(() => load(null));
else signIn();
