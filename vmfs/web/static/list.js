// All machines, a row each, and the dialog that makes new ones.

import { act, upload, post } from "./server.js";
import { button, bytes, field, h, say } from "./dom.js";

export class List {
  constructor(facts, watch) {
    this.facts = facts;
    this.watch = watch;
    this.rows = [];
    this.keys = [["n", "new machine"], ["/", "find a machine"]];
    this.filter = field("Find", { type: "search", oninput: () => this.show() });
    this.count = h("span", { class: "dim", role: "status" });
    this.body = h("tbody");
    this.root = h("div", { class: "list", ondragover: (event) => event.preventDefault(), ondrop: (event) => this.drop(event) },
      h("div", { class: "bar" },
        h("h1", {}, "Machines"), this.count, h("span", { class: "grow" }), this.filter,
        button("New machine", "Make a machine (n)", () => new Maker(this.facts), { class: "main" })),
      h("div", { class: "scroll" },
        h("table", { class: "machines" },
          h("thead", {}, h("tr", {}, ["Name", "State", "Engine", "Kind", "CPUs", "CPU %", "MIPS", "Exits/s", "RAM", "Resident", "Maker",
            ""].map((text) => h("th", { scope: "col" }, text)))),
          this.body)),
      h("p", { class: "drop dim" }, "Drop a kernel, a disk, a CD or a floppy anywhere here: a machine boots it."));
  }

  begin() {
    this.watch({ list: true });
  }

  close() {}

  take(message) {
    if (!message.list) return;
    this.rows = message.list;
    this.show();
  }

  key(key) {
    if (key === "n") new Maker(this.facts);
    else if (key === "/") this.filter.focus();
    else return false;
    return true;
  }

  drop(event) {
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) new Maker(this.facts, file);
  }

  show() {
    const find = this.filter.value.trim();
    const rows = this.rows.filter((row) => row.name.includes(find));
    const running = this.rows.filter((row) => row.state === "running").length;
    this.count.textContent = `${this.rows.length}, ${running} running`;
    const focused = document.activeElement?.dataset?.key;
    this.body.replaceChildren(...rows.map((row) => this.row(row)));
    if (!rows.length) {
      this.body.append(h("tr", {}, h("td", { colspan: "12", class: "dim" },
        this.rows.length ? "None has that in its name." : "There is no machine yet. mkdir makes one, and so does New machine.")));
    }
    if (focused) this.body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  row(row) {
    const cell = (text, label, number = false) => h("td", { "data-label": label, class: number ? "number" : null }, String(text ?? "-"));
    const running = row.state === "running";
    return h("tr", {},
      h("td", { "data-label": "Name" }, h("a", { href: `#/m/${row.name}`, "data-key": `a-${row.name}` }, row.name)),
      h("td", { "data-label": "State" }, h("span", { class: `state ${row.state}` }, row.state)),
      cell(row.engine, "Engine"), cell(row.kind, "Kind"), cell(row.cpus, "CPUs", true), cell(row.cpu, "CPU %", true),
      cell(row.mips, "MIPS", true), cell(row.exits, "Exits/s", true), cell(row.memory && bytes(row.memory), "RAM", true),
      cell(row.resident && bytes(row.resident), "Resident", true), cell(row.maker, "Maker"),
      h("td", { class: "row" }, button(running ? "Pause" : "Run", `${running ? "Pause" : "Run"} ${row.name}`, async () => {
        await act(row.name, running ? "pause" : "run").catch((error) => say(`${row.name}: ${error.message}`));
      }, { "data-key": `b-${row.name}` })));
  }
}

let made = 0;

class Maker {
  constructor(facts, file) {
    this.facts = facts;
    const option = (value, text) => h("option", { value }, text ?? value);
    const pick = (label) => h("input", { type: "file", "aria-label": label });
    this.name = field("Name", { value: `vm${++made}-${Math.random().toString(36).slice(2, 6)}`, required: true, pattern: "[A-Za-z0-9_\\-][A-Za-z0-9._\\-]{0,63}" });
    this.kind = h("select", { "aria-label": "Kind", onchange: () => this.show() },
      option("pc", "a PC that boots a file"), option("bare", "a bare CPU"));
    this.file = pick("What it boots");
    this.initrd = pick("Its initrd");
    this.cmdline = field("Command line", { placeholder: "console=ttyS0" });
    this.access = h("select", { "aria-label": "Disk is opened" },
      option("", "as usual for what it is"), option("cow", "copy on write"), option("rw", "read and write"), option("ro", "read only"));
    this.mode = h("select", { "aria-label": "Mode" }, ["long", "protected", "real"].map((mode) => option(mode)));
    this.at = field("Address", { value: "0x1000" });
    this.mem = field("RAM", { value: "512M" });
    this.cpus = field("CPUs", { value: "1", inputmode: "numeric" });
    this.engine = h("select", { "aria-label": "Engine" }, option("auto", "the mount's"), facts.engines.map((name) => option(name)));
    this.start = h("input", { type: "checkbox", checked: true });
    this.uefi = h("input", { type: "checkbox" });
    this.progress = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
    this.failure = h("p", { class: "bad", role: "alert" });
    this.submit = h("button", { class: "main" }, "Make");
    const line = (label, control, kind = "") => h("label", { class: `line ${kind}` }, h("span", {}, label), control);
    this.form = h("form", { onsubmit: (event) => { event.preventDefault(); this.make(); } },
      h("h2", {}, "New machine"),
      line("Name", this.name), line("Kind", this.kind),
      line("Boots", this.file, "pc"), line("Initrd", this.initrd, "pc"), line("Command line", this.cmdline, "pc"), line("Disk", this.access, "pc"),
      line("Flat binary", (this.flat = pick("Flat binary")), "bare"), line("at", this.at, "bare"), line("Mode", this.mode, "bare"),
      line("RAM", this.mem), line("CPUs", this.cpus), line("Engine", this.engine),
      h("label", { class: "line pc" }, h("span", {}, "By UEFI"), this.uefi),
      h("label", { class: "line pc" }, h("span", {}, "Start it"), this.start),
      h("p", { class: "dim" }, `Files go to this server, which keeps up to ${bytes(facts.upload_most)} of them until it ends.`),
      this.progress, this.failure,
      h("p", { class: "row end" }, button("Cancel", "Cancel", () => this.dialog.close()), this.submit));
    this.dialog = h("dialog", { "aria-label": "New machine", onclose: () => this.dialog.remove() }, this.form);
    if (file) {
      const files = new DataTransfer();
      files.items.add(file);
      this.file.files = files.files;
      const stem = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]/g, "-").replace(/^\.+/, "").slice(0, 40);
      if (stem) this.name.value = stem;
    }
    document.body.append(this.dialog);
    this.show();
    this.dialog.showModal();
    this.name.select();
  }

  show() {
    for (const each of this.form.querySelectorAll(".pc, .bare")) each.hidden = !each.classList.contains(this.kind.value);
  }

  async send(input, part, of) {
    const file = input.files[0];
    if (!file) return null;
    this.progress.hidden = false;
    return upload(file, (done) => { this.progress.value = (part + done) / of; });
  }

  async make() {
    this.submit.disabled = true;
    this.failure.textContent = "";
    const bare = this.kind.value === "bare";
    const said = { name: this.name.value.trim(), kind: this.kind.value, mem: this.mem.value.trim(), engine: this.engine.value,
      cpus: this.cpus.value.trim() };
    try {
      if (bare) {
        Object.assign(said, { mode: this.mode.value, at: this.at.value.trim(), file: await this.send(this.flat, 0, 1) });
      } else {
        const both = this.initrd.files.length ? 2 : 1;
        Object.assign(said, { file: await this.send(this.file, 0, both), initrd: await this.send(this.initrd, 1, both),
          cmdline: this.cmdline.value.trim() || null, mode: this.access.value, uefi: this.uefi.checked, start: this.start.checked });
      }
      await post("api/machines", said);
      this.dialog.close();
      location.hash = `#/m/${said.name}`;
    } catch (error) {
      this.failure.textContent = error.message;
    } finally {
      this.submit.disabled = false;
      this.progress.hidden = true;
    }
  }
}
