// The display: by VNC where the machine has it, else as pictures, as often as they come.

import { Pane } from "./pane.js";
import { button, h } from "../dom.js";
import RFB from "../vendor/novnc/core/rfb.js";
import { act, picture, socket } from "../server.js";

const EVERY = 400;  // milliseconds between pictures
const AGAIN = 15000;  // and until VNC is tried again
const NAMES = { Enter: "enter", Escape: "esc", Tab: "tab", Backspace: "backspace", " ": "space", ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left",
  ArrowRight: "right", Home: "home", End: "end", PageUp: "pgup", PageDown: "pgdn", Insert: "ins", Delete: "del", Pause: "pause", ContextMenu: "menu" };

export class Screen extends Pane {
  constructor(view) {
    super(view, "screen", "Screen", { kind: "pc-only" });
    this.image = h("img", { alt: "The machine's screen", draggable: false, hidden: true });
    this.text = h("pre", { class: "unseen", id: "screen-text", "aria-label": "The text on the screen" });
    this.frame = h("div", { class: "guest screen-frame", tabindex: "0", role: "application", "aria-label": "Screen and keyboard of the machine; ctrl-] leaves it", "aria-describedby": "screen-text" }, this.image);
    this.frame.addEventListener("keydown", (event) => this.press(event), true);
    this.tools.append(button("ctrl-alt-del", "Press ctrl-alt-del", () => view.do("keys", { line: "ctrl-alt-del" })));
    this.body.append(this.frame, this.text);
    this.typing = Promise.resolve();
  }

  sources() {
    return { screen: {} };
  }

  take(source, data, error) {
    if (source === "head") {
      if (data && data.machine !== "bare") this.follow();
      return;
    }
    this.text.textContent = (data ?? [error]).join("\n");
  }

  get isWatched() {
    return this.isLookedAt && this.root.isConnected && !document.hidden && !this.closed;
  }

  // While it is looked at: by VNC; where that is not to be had, by pictures, and VNC is tried again after a while.
  async follow() {
    if (this.following || !this.isWatched) return;
    this.following = true;
    if (!(await this.watch())) {
      const until = performance.now() + AGAIN;
      while (this.isWatched && performance.now() < until) {
        await this.picture();
        await new Promise((resolve) => setTimeout(resolve, EVERY));
      }
    }
    this.following = false;
  }

  // By VNC, until it ends or is not looked at; whether there was something to see.
  watch() {
    return new Promise((resolve) => {
      let seen = false;
      const one = socket(`api/machines/${encodeURIComponent(this.view.name)}/vnc`);
      const rfb = new RFB(this.frame, one, { shared: true });
      Object.assign(rfb, { scaleViewport: true, background: "#000", focusOnClick: true, showDotCursor: true });
      const looking = setInterval(() => { if (!this.isWatched) rfb.disconnect(); }, 300);
      rfb.addEventListener("connect", () => {
        seen = true;
        this.rfb = rfb;
        this.image.hidden = true;
        this.failure.hidden = true;
        this.root.dataset.by = "vnc";
      });
      rfb.addEventListener("credentialsrequired", async () => {
        rfb.sendCredentials({ password: await act(this.view.name, "screen-password").catch(() => "") });
      });
      rfb.addEventListener("disconnect", () => {
        clearInterval(looking);
        this.rfb = null;
        delete this.root.dataset.by;
        resolve(seen);
      });
    });
  }

  async picture() {
    try {
      const next = await picture(this.view.name, this.tag);
      this.failure.hidden = true;
      this.image.hidden = false;
      if (!next) return;
      this.tag = next.tag;
      const url = URL.createObjectURL(next.blob);
      this.image.onload = () => URL.revokeObjectURL(url);
      this.image.src = url;
    } catch (error) {
      this.failure.textContent = error.message;
      this.failure.hidden = false;
    }
  }

  press(event) {
    if (event.ctrlKey && event.key === "]") {
      this.title.focus();
      event.preventDefault();
      event.stopPropagation();
      return;
    }
    if (this.rfb) return;  // it has all other keys itself
    const name = NAMES[event.key] ?? (/^F([1-9]|1[0-2])$/.test(event.key) ? event.key.toLowerCase() : "");
    const plain = event.key.length === 1 && event.key.charCodeAt(0) < 127;
    if (!name && !plain) return;
    event.preventDefault();
    const with_ = [event.ctrlKey && "ctrl", event.altKey && "alt", event.metaKey && "win"].filter(Boolean);
    const body = name || with_.length ? { line: [...with_, event.shiftKey && name && "shift", name || event.key.toLowerCase()].filter(Boolean).join("-") } : { text: event.key };
    this.typing = this.typing.then(() => this.view.do("keys", body));  // in order
  }

  close() {
    this.closed = true;
    this.rfb?.disconnect();
  }
}
