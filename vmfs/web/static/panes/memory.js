// Memory as hexadecimal. It is edited in place: type digits where the mark is.

import { Pane } from "./pane.js";
import { button, field, h, onEnter } from "../dom.js";

const WIDTH = 16, ROWS = 16;

export class Memory extends Pane {
  constructor(view) {
    super(view, "memory", "Memory");
    Object.assign(this, { at: "rsp", space: "virt", bytes: [], base: 0n, mark: 0, half: "" });
    this.where = onEnter(field("Address, register or symbol", { value: this.at }), (at) => this.goTo(at));
    this.pick = h("select", { "aria-label": "Addresses", onchange: () => this.goTo(this.where.value.trim(), this.pick.value) },
      h("option", { value: "virt" }, "linear"), h("option", { value: "mem" }, "physical"));
    this.tools.append(this.where, this.pick, button("▲", "The page before", () => this.move(-WIDTH * ROWS)), button("▼", "The page after", () => this.move(WIDTH * ROWS)),
      button("Who wrote", "Which instruction wrote the marked byte last (needs a history)", () => this.writer()));
    this.grid = h("div", { class: "hex mono", role: "grid", tabindex: "0", "aria-label": "Bytes; digits change the marked one, arrows move the mark" });
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.grid.addEventListener("click", (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined) this.setMark(Number(index));
    });
    this.said = h("output", { class: "mono said" });
    this.body.append(this.grid, this.said);
    this.cells = [];
    this.lay();
  }

  sources() {
    return { memory: { at: this.at, space: this.space, size: WIDTH * ROWS } };
  }

  goTo(at, space = this.space) {
    if (!at) return;
    this.at = at;
    this.space = space;
    this.where.value = at;
    this.pick.value = space;
    this.bytes = [];
    if (!this.isOpen) this.open(true);
    this.root.scrollIntoView({ block: "nearest" });
    this.view.refresh();
  }

  move(by) {
    this.goTo(`0x${BigInt.asUintN(64, this.base + BigInt(by)).toString(16)}`);
  }

  forget() {
    this.bytes = [];
  }

  lay() {
    this.rows = Array.from({ length: ROWS }, (_, row) => {
      const address = h("span", { class: "address dim", role: "rowheader" });
      const cells = Array.from({ length: WIDTH }, (_, column) =>
        h("span", { role: "gridcell", class: "byte", "data-index": String(row * WIDTH + column) }, "··"));
      const text = h("span", { class: "ascii", "aria-hidden": "true" });
      this.cells.push(...cells);
      return { address, text, root: h("div", { role: "row" }, address, h("span", { class: "cells", role: "presentation" }, cells), text) };
    });
    this.grid.append(...this.rows.map((row) => row.root));
    this.setMark(0);
  }

  render(_, { at, bytes }) {
    const base = BigInt(at);
    const same = base === this.base && this.bytes.length === bytes.length;
    bytes.forEach((byte, index) => {
      const cell = this.cells[index];
      cell.textContent = byte === null ? "··" : byte.toString(16).padStart(2, "0");
      cell.classList.toggle("changed", same && this.bytes[index] !== byte);
      cell.classList.toggle("zero", byte === 0);
    });
    this.rows.forEach((row, number) => {
      row.address.textContent = BigInt.asUintN(64, base + BigInt(number * WIDTH)).toString(16).padStart(this.space === "virt" ? 16 : 10, "0");
      row.text.textContent = bytes.slice(number * WIDTH, (number + 1) * WIDTH).map((byte) => (byte >= 32 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    });
    this.base = base;
    this.bytes = bytes;
  }

  setMark(index) {
    this.cells[this.mark]?.classList.remove("mark");
    this.cells[this.mark]?.removeAttribute("aria-selected");
    this.mark = Math.max(0, Math.min(index, this.cells.length - 1));
    this.half = "";
    const cell = this.cells[this.mark];
    cell.classList.add("mark");
    cell.setAttribute("aria-selected", "true");
  }

  get marked() {
    return `0x${BigInt.asUintN(64, this.base + BigInt(this.mark)).toString(16)}`;
  }

  async key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -WIDTH, ArrowDown: WIDTH }[event.key];
    if (step) this.setMark(this.mark + step);
    else if (event.key === "PageUp") this.move(-WIDTH * ROWS);
    else if (event.key === "PageDown") this.move(WIDTH * ROWS);
    else if (event.key === "Home") this.setMark(this.mark - this.mark % WIDTH);
    else if (event.key === "End") this.setMark(this.mark - this.mark % WIDTH + WIDTH - 1);
    else if (/^[0-9a-fA-F]$/.test(event.key)) {
      event.preventDefault();
      if (!this.half) {
        this.half = event.key;
        this.cells[this.mark].textContent = `${event.key}_`;
        return;
      }
      const hex = this.half + event.key, at = this.marked;
      this.cells[this.mark].textContent = hex;
      this.setMark(this.mark + 1);
      await this.view.do("set-memory", { space: this.space, at, hex });
      return;
    } else return;
    event.preventDefault();
  }

  async writer() {
    this.said.textContent = "looking …";
    const said = await this.view.do("writer", { at: this.marked, length: 1, space: this.space });
    this.said.textContent = said ?? "";
    const match = /count=(\d+)/.exec(said ?? "");
    if (match) this.said.append(" ", button("Go there", "Go to just before it", () => this.view.do("goto", { instructions: Number(match[1]) })));
  }
}
