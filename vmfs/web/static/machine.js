// One machine: what stands above all, the buttons, and its panes. A pane that is closed or out of sight is not asked for.

import { Code, Points, Stack } from "./panes/code.js";
import { Consoles } from "./panes/console.js";
import { Devices, Pages, Snapshots, Trace, Why } from "./panes/lists.js";
import { Memory } from "./panes/memory.js";
import { Past } from "./panes/past.js";
import { Registers } from "./panes/registers.js";
import { Screen } from "./panes/screen.js";
import { act } from "./server.js";
import { ask, button, bytes, grouped, h, say } from "./dom.js";

const COLUMNS = [[Screen, Consoles], [Code, Stack, Points], [Registers, Memory]];
const BELOW = [Snapshots, Trace, Pages, Why, Devices];

export class Machine {
  constructor(name, facts, watch) {
    Object.assign(this, { name, facts, tell: watch, cpu: 0, seen: new Set(), facing: {} });
    this.keys = [["r", "run or pause"], ["s", "step one instruction"], ["o", "step over a call"], ["b", "step back"],
      ["p", "back to the stop before"], ["n", "keep a snapshot"], ["f", "fork"], ["g", "disassemble at …"], ["m", "memory at …"], ["/", "find a register"]];
    this.state = h("span", { class: "state" });
    this.exit = h("output", { class: "exit", "aria-label": "Last exit" });
    this.counts = h("span", { class: "dim counts" });
    this.cpus = h("select", { "aria-label": "CPU", hidden: true, onchange: () => this.choose(Number(this.cpus.value)) });
    const b = (text, title, action, more) => button(text, title, action, more);
    this.running = b("Run", "Run (r)", () => this.toggle(), { class: "main", id: "b-run" });
    this.buttons = h("div", { class: "buttons", role: "toolbar", "aria-label": "Machine" },
      this.running,
      h("span", { class: "set" },
        this.still(b("Step", "Step one instruction (s)", () => this.do("step"), { id: "b-step" })),
        this.still(b("Over", "Step over a call (o)", () => this.over(), { id: "b-over" }))),
      h("span", { class: "set" },
        (this.backward = this.still(b("Step back", "Go back one instruction (b)", () => this.do("back", { count: 1 }), { id: "b-back" }))),
        (this.backToStop = this.still(b("Back to stop", "Go back to the stop before (p)", () => this.do("back"), { id: "b-stop" })))),
      h("span", { class: "set" },
        b("Snapshot", "Keep a snapshot (n)", () => this.snapshot(), { id: "b-snapshot" }),
        b("Fork", "Fork: a copy beside it (f)", () => this.fork(), { id: "b-fork" })),
      h("span", { class: "set" },
        b("Reset", "Reset the CPUs", () => this.do("reset"), { id: "b-reset" }),
        b("Remove", "Remove the machine", () => this.remove(), { id: "b-remove", class: "danger" })),
      this.cpus);
    this.panes = [];
    const make = (Kind) => { const pane = new Kind(this); this.panes.push(pane); return pane.root; };
    this.past = h("div", { class: "time" }, make(Past));
    this.columns = h("div", { class: "columns" }, COLUMNS.map((kinds) => h("div", { class: "column" }, kinds.map(make))));
    this.below = h("div", { class: "below" }, BELOW.map(make));
    this.root = h("div", { class: "machine" },
      h("div", { class: "head" },
        h("div", { class: "bar" }, h("h1", {}, name), this.state, this.exit, h("span", { class: "grow" }), this.counts),
        this.buttons),
      this.past, this.columns, this.below);
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) this.panes.find((pane) => pane.root === entry.target).isInSight = entry.isIntersecting;
      this.refresh();
    }, { rootMargin: "200px" });
  }

  begin() {
    for (const pane of this.panes) this.observer.observe(pane.root);
    this.refresh();
  }

  close() {
    this.observer.disconnect();
    for (const pane of this.panes) pane.close();
  }

  // The buttons that need a machine that stands.
  still(control) {
    (this.standing ??= []).push(control);
    return control;
  }

  // What is looked at now.
  refresh() {
    const panes = { head: {}, history: {} };
    for (const pane of this.panes) if (pane.isLookedAt) Object.assign(panes, pane.sources());
    this.tell({ machine: this.name, cpu: this.cpu, panes });
    if (this.facing.state) for (const pane of this.panes) if (pane.isLookedAt) pane.take("head", this.facing);
  }

  take(message) {
    if (!message.pane) return;
    if (message.pane === "head" && message.data) this.takeHead(message.data);
    if (message.pane === "history") this.takeHistory(message.data);
    for (const pane of this.panes) {
      if (message.pane in pane.sources() || message.pane === "head") pane.take(message.pane, message.data, message.error);
    }
  }

  takeHead(head) {
    const before = this.facing;
    this.facing = head;
    this.state.textContent = head.state;
    this.state.className = `state ${head.state}`;
    this.exit.textContent = head.exit;
    const running = head.state === "running";
    this.running.textContent = running ? "Pause" : "Run";
    this.running.title = running ? "Pause (r)" : "Run (r)";
    this.running.setAttribute("aria-label", this.running.title);
    for (const each of this.standing) each.disabled = running;
    const parts = [head.machine, head.engine, `${head.cpus} CPU${head.cpus === "1" ? "" : "s"}`, bytes(head.memory)];
    if (head.instructions !== null) parts.push(`${grouped(head.instructions)} instructions`);
    const now = performance.now();
    if (before.state === "running" && running && head.instructions !== null) {
      const rate = (head.instructions - before.instructions) / (now - this.headAt) / 1000;
      parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} MIPS`, `${grouped(Math.round((head.exits - before.exits) / (now - this.headAt) * 1000))} exits/s`);
    }
    this.headAt = now;
    this.counts.textContent = parts.join(" · ");
    const count = Number(head.cpus);
    if (this.cpus.options.length !== count) {
      this.cpus.replaceChildren(...Array.from({ length: count }, (_, cpu) => h("option", { value: String(cpu) }, `CPU ${cpu}`)));
      this.cpus.hidden = count < 2;
    }
    this.root.classList.toggle("bare", head.machine === "bare");
    this.updateBackward();
  }

  takeHistory(history) {
    this.history = history;
    this.updateBackward();
  }

  updateBackward() {
    const on = this.history && !("off" in this.history) && this.facing.state !== "running";
    for (const each of [this.backward, this.backToStop]) each.disabled = !on;
  }

  choose(cpu) {
    this.cpu = cpu;
    this.cpus.value = String(cpu);
    for (const pane of this.panes) pane.forget();
    this.refresh();
  }

  key(key) {
    const named = { r: "b-run", s: "b-step", o: "b-over", b: "b-back", p: "b-stop", n: "b-snapshot", f: "b-fork" }[key];
    if (named) {
      const one = this.buttons.querySelector(`#${named}`);
      if (!one.disabled) one.click();
      return true;
    }
    const field = { g: ".code input", m: ".memory input", "/": ".registers input" }[key];
    if (!field) return false;
    const pane = this.panes.find((each) => each.root.querySelector(field));
    pane?.open(true);
    pane?.root.querySelector(field).focus();
    return true;
  }

  // An action; what it returned, undefined where it failed, which was said then.
  async do(action, body = {}) {
    this.root.classList.add("busy");
    try {
      return (await act(this.name, action, { cpu: this.cpu, ...body })) ?? null;
    } catch (error) {
      say(`${action}: ${error.message}`);
      return undefined;
    } finally {
      this.root.classList.remove("busy");
    }
  }

  toggle() {
    return this.do(this.facing.state === "running" ? "pause" : "run");
  }

  over() {
    const code = this.panes.find((pane) => pane instanceof Code);
    const next = code.afterCall();
    return next ? this.do("until", { at: next }) : this.do("step");
  }

  async snapshot() {
    const name = await ask("Keep a snapshot", { value: `s${new Date().toISOString().slice(11, 19).replace(/:/g, "")}`, yes: "Keep" });
    if (name && await this.do("snapshot", { name }) !== undefined) say(`Kept as ${name}.`, "good");
  }

  async fork(of) {
    const name = await ask(of ? `Fork ${of}` : "Fork", { text: "A machine beside this one, paused.", value: `${this.name}-${Math.random().toString(36).slice(2, 6)}`, yes: "Fork" });
    if (name && await this.do("fork", { name, of }) !== undefined) {
      say(`${name} is there.`, "good");
      location.hash = `#/m/${name}`;
    }
  }

  async remove() {
    if (await ask(`Remove ${this.name}?`, { text: "The machine and its snapshots are gone then.", yes: "Remove", danger: true })
      && await this.do("remove") !== undefined) location.hash = "#/";
  }

  // From anywhere: show code, or memory, at an address.
  showCode(at) {
    this.panes.find((pane) => pane instanceof Code).goTo(at);
  }

  showMemory(at, space) {
    this.panes.find((pane) => pane instanceof Memory).goTo(at, space);
  }
}
