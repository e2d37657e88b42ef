// Serial ports and virtio consoles, a terminal each.

import { FitAddon } from "../vendor/xterm/addon-fit.mjs";
import { Terminal } from "../vendor/xterm/xterm.mjs";
import { Pane } from "./pane.js";
import { button, h } from "../dom.js";
import { socket } from "../server.js";

// xterm.js makes style elements, which the page's policy takes with its nonce only.
const nonce = document.getElementById("nonce").dataset.nonce;
const create = document.createElement.bind(document);
document.createElement = (name, ...rest) => {
  const element = create(name, ...rest);
  if (String(name).toLowerCase() === "style") element.nonce = nonce;
  return element;
};

const DARK = { background: "#14171a", foreground: "#d5d9dd", cursor: "#d5d9dd", selectionBackground: "#3d5a73" };

export class Consoles extends Pane {
  constructor(view) {
    super(view, "consoles", "Console", { kind: "pc-only" });
    this.tabs = h("span", { role: "tablist", "aria-label": "Ports" });
    this.tools.append(this.tabs);
    this.stage = h("div", { class: "guest stage" });
    this.body.append(this.stage);
    this.tabs.append(...view.facts.ports.map((port) => button(port, `Port ${port}`, () => this.choose(port), { role: "tab", "data-port": port })));
    this.resizes = new ResizeObserver(() => this.fit());
    this.resizes.observe(this.stage);
    this.port = view.facts.ports[0];
    this.mark();
  }

  take(source, data) {
    if (source !== "head" || !data || data.machine === "bare") return;
    const off = data.state === "shutdown" || data.state === "failed";
    if (this.isLookedAt && !this.socket && (!off || !this.terminal)) this.join();
  }

  choose(port) {
    this.leave();
    this.terminal?.dispose();
    this.terminal = null;
    this.port = port;
    this.mark();
    this.join();
  }

  mark() {
    for (const tab of this.tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.port === this.port));
  }

  join() {
    if (!this.terminal) {
      this.terminal = new Terminal({ fontSize: 12, scrollback: 5000, theme: DARK, cursorBlink: false, screenReaderMode: false,
        fontFamily: "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace", convertEol: false, allowProposedApi: false });
      this.fitter = new FitAddon();
      this.terminal.loadAddon(this.fitter);
      this.stage.replaceChildren();
      this.terminal.open(this.stage);
      this.terminal.attachCustomKeyEventHandler((event) => {
        if (!(event.ctrlKey && event.key === "]")) return true;
        if (event.type === "keydown") this.title.focus();
        event.preventDefault();
        return false;
      });
      this.terminal.onData((data) => this.send(data));
      this.terminal.onBinary((data) => this.send(data));
      this.fit();
    } else this.terminal.reset();
    const one = socket(`api/machines/${encodeURIComponent(this.view.name)}/streams/${this.port}`);
    one.binaryType = "arraybuffer";
    let isOld = true;  // what was said before: a question in it was answered then, or was to nobody
    one.onmessage = (event) => {
      if (!isOld) return this.terminal?.write(new Uint8Array(event.data));
      isOld = false;
      this.isSilent = true;
      return this.terminal?.write(new Uint8Array(event.data), () => { this.isSilent = false; });
    };
    one.onclose = (event) => {
      if (this.socket !== one) return;
      this.socket = null;
      if (event.reason) this.terminal?.write(`\r\n\x1b[2m[${event.reason}]\x1b[0m\r\n`);
      if (event.code !== 1000) setTimeout(() => { this.socket ??= null; }, 1000);
    };
    this.socket = one;
  }

  // Keys, and the terminal's answers to what the guest asks it, of which the page that is typed in gives the only one.
  send(text) {
    if (this.isSilent || !this.stage.contains(document.activeElement)) return;
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(new TextEncoder().encode(text));
  }

  leave() {
    const one = this.socket;
    this.socket = null;
    one?.close();
  }

  fit() {
    if (this.terminal && this.stage.clientWidth > 50) this.fitter.fit();
  }

  open(isOpen) {
    super.open(isOpen);
    if (!isOpen) this.leave();
  }

  close() {
    this.resizes.disconnect();
    this.leave();
    this.terminal?.dispose();
  }
}
