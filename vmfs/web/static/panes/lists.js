// Page tables, trace, why, snapshots and devices.

import { Pane } from "./pane.js";
import { button, bytes, field, h, onEnter } from "../dom.js";

export class Pages extends Pane {
  constructor(view) {
    super(view, "pages", "Page tables", { open: false });
    Object.assign(this, { find: "", at: "" });
    this.tools.append(
      onEnter(field("Walk to an address"), (at) => { this.at = at; view.refresh(); }),
      onEnter(field("Find in the ranges", { type: "search" }), (find) => { this.find = find; view.refresh(); }));
    this.walk = h("div");
    this.ranges = h("pre", { class: "mono", tabindex: "0", "aria-label": "Ranges" });
    this.body.append(this.walk, this.ranges);
  }

  sources() {
    return { pagetable: { ...(this.find && { find: this.find }), ...(this.at && { at: this.at }) } };
  }

  render(_, { lines, more, at, walk }) {
    this.ranges.textContent = lines.join("\n") + (more ? `\n… and ${more} more: find some` : "");
    this.walk.replaceChildren();
    if (!walk) return;
    this.walk.append(h("p", {}, walk.length ? `The way to ${at}:` : `${at} is reached without tables, or is not canonical.`));
    if (!walk.length) return;
    this.walk.append(h("table", { class: "mono walk" },
      h("thead", {}, h("tr", {}, ["An entry maps", "stands at", "is", "has", "leads to"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, walk.map((step) => h("tr", {}, h("td", {}, step.maps),
        h("td", {}, button(step.address, "Show it in memory", () => this.view.showMemory(step.address, "mem"), { class: "plain address" })),
        h("td", {}, step.entry), h("td", {}, step.flags), h("td", {}, step.leads))))));
  }
}

export class Trace extends Pane {
  constructor(view) {
    super(view, "trace", "Trace", { open: false });
    this.lines = [];
    this.kinds = ["insn", "mem", "exceptions", "interrupts", "exits"].map((kind) =>
      h("input", { type: "checkbox", value: kind, checked: kind === "insn", "aria-label": `Trace ${kind}` }));
    this.toggle = button("Start", "Trace what is ticked", () => this.switch());
    this.about = h("span", { class: "dim" });
    this.tools.append(...this.kinds.map((box) => h("label", { class: "check" }, box, box.value)), this.toggle,
      button("Clear", "Empty this list", () => { this.lines = []; this.text.textContent = ""; }));
    this.text = h("pre", { class: "mono tail", tabindex: "0", "aria-label": "The last events" });
    this.body.append(this.about, this.text);
  }

  sources() {
    return { trace: { follow: this.isOn } };
  }

  async switch() {
    const kinds = this.isOn ? [] : this.kinds.filter((box) => box.checked).map((box) => box.value);
    if (await this.view.do("trace", { kinds }) === undefined) return;
    this.isOn = kinds.length > 0;
    this.view.refresh();
  }

  render(_, { on, events, lines, left_out: leftOut }) {
    this.isOn = !on.startsWith("off");
    this.toggle.textContent = this.isOn ? "Stop" : "Start";
    this.about.textContent = this.isOn ? `${on.split(",full=")[0]}, ${events} events` : "";
    if (lines?.length) {
      if (leftOut) this.lines.push(`… ${leftOut} more`);
      this.lines = [...this.lines, ...lines].slice(-500);
      this.text.textContent = this.lines.join("\n");
      this.text.scrollTop = this.text.scrollHeight;
    }
    this.view.refresh();
  }
}

export class Why extends Pane {
  constructor(view) {
    super(view, "why", "Why", { open: false });
    this.text = h("pre", { class: "mono", tabindex: "0", "aria-label": "Why it has shut down" });
    this.body.append(this.text);
  }

  sources() {
    return { why: {} };
  }

  render(_, text) {
    this.text.textContent = text || "It has not shut down, and was not reset.";
  }
}

export class Snapshots extends Pane {
  constructor(view) {
    super(view, "snapshots", "Snapshots", { open: false });
    this.table = h("tbody");
    this.tools.append(button("Keep one", "Keep a snapshot", () => view.snapshot()));
    this.body.append(h("table", {}, h("thead", {}, h("tr", {}, ["Name", "Taken", "Instructions", "Its own", ""].map((text) => h("th", { scope: "col" }, text)))), this.table));
  }

  sources() {
    return { snapshots: {} };
  }

  render(_, { at, rows }) {
    this.table.replaceChildren(...rows.map((row) => h("tr", { class: row.name === at ? "here" : null },
      h("td", {}, row.name), h("td", {}, row.taken ?? "-"), h("td", { class: "number" }, row.instructions ?? "-"), h("td", { class: "number" }, bytes(Number(row.own ?? 0))),
      h("td", { class: "row" },
        button("Restore", `Be ${row.name} again`, () => this.view.do("restore", { name: row.name })),
        button("Fork", `Fork ${row.name}`, () => this.view.fork(row.name)),
        button("Drop", `Drop ${row.name}`, () => this.view.do("drop", { name: row.name }), { class: "danger" })))));
    if (!rows.length) this.table.append(h("tr", {}, h("td", { colspan: "5", class: "dim" }, "None is kept.")));
  }
}

export class Devices extends Pane {
  constructor(view) {
    super(view, "devices", "Devices", { open: false, kind: "pc-only" });
    this.table = h("tbody");
    this.unclaimed = h("pre", { class: "mono", tabindex: "0", "aria-label": "What no device has answered" });
    this.body.append(h("table", { class: "mono" }, h("tbody"), this.table), h("h3", {}, "Unclaimed"), this.unclaimed);
  }

  sources() {
    return { devices: {} };
  }

  render(_, { rows, unclaimed }) {
    this.table.replaceChildren(...rows.map((row) => h("tr", {}, ["name", "type", "address", "irq", "info"].map((name) => h("td", {}, row[name] ?? "")))));
    this.unclaimed.textContent = unclaimed.join("\n") || "nothing";
  }
}
