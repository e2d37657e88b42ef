// The page: which view is shown, the connection, and keys.

import { button, h, say } from "./dom.js";
import { List } from "./list.js";
import { Machine } from "./machine.js";
import { get, Live, forgetToken, Refused, takeToken } from "./server.js";

const main = document.getElementById("main");
let view, live, facts;

function token() {
  main.replaceChildren(h("section", { class: "alone" },
    h("h1", {}, "This page needs its token"),
    h("p", {}, "Open the address that ", h("code", {}, "vmfs web"), " has printed: it ends in ", h("code", {}, "#token="),
      " and the token. It is another one each time that ", h("code", {}, "vmfs web"), " is started, and is for one tab.")));
}

function route() {
  const match = /^#\/m\/([\w.-]+)$/.exec(location.hash);
  if (match && view instanceof Machine && view.name === match[1]) return;
  view?.close();
  if (match) view = new Machine(match[1], facts, (what) => live.watch(what));
  else view = new List(facts, (what) => live.watch(what));
  document.title = match ? `${match[1]} – vmfs` : "vmfs";
  main.replaceChildren(view.root);
  view.begin();
}

function take(message) {
  if (message.busy) return;
  if (message.failed) say(message.failed);
  else if (message.gone !== undefined && view instanceof Machine && view.name === message.gone) {
    say(`${message.gone}: ${message.reason}`);
    location.hash = "#/";
  } else view?.take(message);
}

function help() {
  const rows = (pairs) => pairs.map(([keys, what]) => h("tr", {}, h("td", {}, h("kbd", {}, keys)), h("td", {}, what)));
  const dialog = h("dialog", { "aria-label": "Keys and help", onclose: () => dialog.remove() },
    h("h2", {}, "Keys"),
    h("table", { class: "keys" }, h("tbody", {}, rows([...keysEverywhere, ...(view?.keys ?? [])]))),
    h("p", {}, "Tab and shift-Tab go through all controls. In a console or on a screen all keys go to the guest, but for ",
      h("kbd", {}, "ctrl-]"), ", which leaves it."),
    h("p", {}, "An address is a number, a register, a symbol or FILE:LINE, as ", h("code", {}, "0x1000"), ", ",
      h("code", {}, "rsp+0x10"), ", ", h("code", {}, "start_kernel"), "."),
    h("p", { class: "row end" }, button("Close", "Close", () => dialog.close(), { class: "main" })));
  document.body.append(dialog);
  dialog.showModal();
}

const keysEverywhere = [["?", "this help"], ["l", "all machines"]];

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.target.closest("input, select, textarea, dialog, .guest, [role=grid]")) return;
  if (event.key === "?") help();
  else if (event.key === "l") location.hash = "#/";
  else if (!view?.key?.(event.key)) return;
  event.preventDefault();
}

async function begin() {
  document.getElementById("help-button").addEventListener("click", help);
  document.addEventListener("keydown", key);
  addEventListener("hashchange", () => { if (/^#token=/.test(location.hash)) location.reload(); });
  for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
  if (takeToken()) await connect();
  else token();
}

async function connect() {
  try {
    facts = await get("api/server");
  } catch (error) {
    if (error instanceof Refused) {
      forgetToken();
      token();
      return;
    }
    say(error.message);
    setTimeout(connect, 3000);
    return;
  }
  document.getElementById("mount").textContent = facts.mount;
  const link = document.getElementById("link");
  live = new Live({ message: take, state: (state) => {
    link.textContent = state === "on" ? "" : "not connected";
    document.body.classList.toggle("off", state !== "on");
    if (state === "on") view?.reconnected?.();
  } });
  addEventListener("hashchange", route);
  route();
}

begin();
