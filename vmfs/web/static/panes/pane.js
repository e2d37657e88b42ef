// What all panes have: a title that opens and closes them, tools, and a body or the sentence that says why there is none.

import { h, remembered } from "../dom.js";

export class Pane {
  constructor(view, name, title, { open = true, kind = "" } = {}) {
    this.view = view;
    this.name = name;
    this.isInSight = false;
    this.isOpen = remembered(`open.${name}`) ?? open;
    this.title = h("button", { type: "button", class: "title", onclick: () => this.open(!this.isOpen) }, title);
    this.tools = h("span", { class: "tools" });
    this.body = h("div", { class: "body", id: `body-${name}` });
    this.failure = h("p", { class: "dim failure", hidden: true });
    this.title.setAttribute("aria-controls", this.body.id);
    this.root = h("section", { class: `pane ${name} ${kind}`, "aria-label": title },
      h("div", { class: "pane-head" }, h("h2", {}, this.title), h("span", { class: "grow" }), this.tools), this.failure, this.body);
    this.show();
  }

  get isLookedAt() {
    return this.isOpen && this.isInSight;
  }

  open(isOpen) {
    this.isOpen = isOpen;
    remembered(`open.${this.name}`, isOpen);
    this.show();
    this.view.refresh();
  }

  show() {
    this.title.setAttribute("aria-expanded", String(this.isOpen));
    this.root.classList.toggle("closed", !this.isOpen);
  }

  // What it wants of the machine: the panes of the server, with what they are asked.
  sources() {
    return {};
  }

  take(source, data, error) {
    if (source === "head") return;
    this.failure.textContent = error ?? "";
    this.failure.hidden = !error;
    if (data !== undefined) this.render(source, data);
  }

  render() {}

  // Another CPU is looked at.
  forget() {}

  close() {}
}
