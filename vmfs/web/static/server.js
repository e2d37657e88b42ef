// What this page says to its server. The token comes with the address, in the part that is sent to nobody, and is kept
// for this tab alone.

const KEY = "vmfs.token";

export function takeToken() {
  const match = /^#token=([\w-]+)$/.exec(location.hash);
  if (match) {
    sessionStorage.setItem(KEY, match[1]);
    history.replaceState(null, "", "#/");
  }
  return Boolean(sessionStorage.getItem(KEY));
}

export function forgetToken() {
  sessionStorage.removeItem(KEY);
}

function headers() {
  return { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` };
}

export class Refused extends Error {}

async function result(response) {
  if (response.status === 403) throw new Refused((await response.text()).trim());
  const answer = await response.json().catch(() => ({ error: `the server has answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer.result;
}

export async function get(path) {
  return result(await fetch(path, { headers: headers() }));
}

export async function post(path, body) {
  return result(await fetch(path, { method: "POST", headers: { ...headers(), "Content-Type": "application/json" },
    body: JSON.stringify(body) }));
}

export function act(machine, action, body = {}) {
  return post(`api/machines/${encodeURIComponent(machine)}/do/${action}`, body);
}

// The picture of a screen, or null where it is the one of `tag`.
export async function picture(machine, tag) {
  const response = await fetch(`api/machines/${encodeURIComponent(machine)}/screen.png`,
    { headers: { ...headers(), ...(tag ? { "If-None-Match": tag } : {}) }, cache: "no-store" });
  if (response.status === 304) return null;
  if (!response.ok) await result(response);
  return { tag: response.headers.get("ETag"), blob: await response.blob() };
}

// What it is called on the server. `progress(part)` is told how much has gone.
export function upload(file, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `api/uploads?name=${encodeURIComponent(file.name)}`);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : 0);
    request.onerror = () => reject(new Error("the server does not answer"));
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* it is no JSON */ }
      if (request.status === 200) resolve(answer.result);
      else reject(new Error(answer.error ?? `the server has answered ${request.status}`));
    };
    request.send(file);
  });
}

export function socket(path) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  return new WebSocket(url, ["vmfs", `token.${sessionStorage.getItem(KEY)}`]);
}

// The connection over which the page is told what is new. It comes again when it breaks.
export class Live {
  constructor({ message, state }) {
    this.tell = { message, state };
    this.watched = {};
    this.connect();
    document.addEventListener("visibilitychange", () => this.send());
  }

  connect() {
    this.socket = socket("live");
    this.socket.onopen = () => { this.tell.state("on"); this.send(); };
    this.socket.onmessage = (event) => this.tell.message(JSON.parse(event.data));
    this.socket.onclose = () => {
      this.tell.state("off");
      setTimeout(() => this.connect(), 1500);
    };
  }

  watch(what) {
    const text = JSON.stringify(what);
    if (text === this.text) return;
    this.text = text;
    this.watched = what;
    this.send();
  }

  send() {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(JSON.stringify({ watch: document.hidden ? {} : this.watched }));
  }
}
