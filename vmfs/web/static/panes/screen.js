// The display: by VNC where the machine has it, else as pictures, as often as they come.

import { Pane } from "./pane.js";
import { button, h } from "../dom.js";
import { picture } from "../server.js";

const EVERY = 400;
const NAMES = { Enter: "enter", Escape: "esc", Tab: "tab", Backspace: "backspace", " ": "space", ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left",
  ArrowRight: "right", Home: "home", End: "end", PageUp: "pgup", PageDown: "pgdn", Insert: "ins", Delete: "del", Pause: "pause", ContextMenu: "menu" };

export class Screen extends Pane {
  constructor(view) {
    super(view, "screen", "Screen", { kind: "pc-only" });
    this.image = h("img", { alt: "The machine's screen", draggable: false, hidden: true });
    this.text = h("pre", { class: "unseen", id: "screen-text", "aria-label": "The text on the screen" });
    this.frame = h("div", { class: "guest screen-frame", tabindex: "0", role: "application", "aria-label": "Screen and keyboard of the machine; ctrl-] leaves it", "aria-describedby": "screen-text" }, this.image);
    this.frame.addEventListener("keydown", (event) => this.press(event));
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

  async follow() {
    if (this.following) return;
    this.following = true;
    while (this.isLookedAt && this.root.isConnected && !document.hidden && !this.closed) {
      try {
        const next = await picture(this.view.name, this.tag);
        this.failure.hidden = true;
        if (next) {
          this.tag = next.tag;
          const url = URL.createObjectURL(next.blob);
          this.image.onload = () => URL.revokeObjectURL(url);
          this.image.src = url;
          this.image.hidden = false;
        }
      } catch (error) {
        this.failure.textContent = error.message;
        this.failure.hidden = false;
      }
      await new Promise((resolve) => setTimeout(resolve, EVERY));
    }
    this.following = false;
  }

  press(event) {
    if (event.ctrlKey && event.key === "]") {
      this.title.focus();
      event.preventDefault();
      return;
    }
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
  }
}
