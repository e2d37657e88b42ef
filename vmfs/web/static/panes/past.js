// The past as a time line: where it begins and ends, where the machine is, its checkpoints, and the stops seen here.

import { Pane } from "./pane.js";
import { button, bytes, grouped, h, field, onEnter } from "../dom.js";

export class Past extends Pane {
  constructor(view) {
    super(view, "past", "Time line");
    this.stops = new Map();
    this.toggle = button("Record", "Keep the past of this machine from now on", () => view.do("record", { on: !this.isOn }));
    this.place = onEnter(field("Go to instruction", { inputmode: "numeric" }), (text) => text && this.go(Number(text.replace(/\D/g, ""))));
    this.tools.append(this.place, this.toggle);
    this.slider = h("input", { type: "range", "aria-label": "Place in the past, in instructions", onchange: () => this.go(Number(this.slider.value)) });
    this.slider.addEventListener("input", () => { this.label.textContent = grouped(this.slider.value); });
    this.marks = h("div", { class: "marks" });
    this.label = h("output", { class: "mono" });
    this.about = h("p", { class: "dim" });
    this.line = h("div", { class: "time-line" }, this.marks, this.slider);
    this.body.append(this.line, h("p", { class: "bar" }, this.label, this.about));
  }

  sources() {
    return { history: {} };
  }

  go(instructions) {
    return this.view.do("goto", { instructions });
  }

  take(source, data, error) {
    if (source === "head" && data) {
      if (this.isOn && data.state !== "running" && data.exit) this.pending = data.exit;
      return;
    }
    super.take(source, data, error);
  }

  render(_, history) {
    this.isOn = !("off" in history);
    this.toggle.textContent = this.isOn ? "Forget" : "Record";
    this.toggle.title = this.isOn ? "Stop recording, and forget the past" : "Keep the past of this machine from now on";
    this.toggle.setAttribute("aria-label", this.toggle.title);
    this.line.hidden = this.place.hidden = !this.isOn;
    if (!this.isOn) {
      this.stops.clear();
      this.label.textContent = "";
      this.about.textContent = "It is not recorded. Record keeps checkpoints and what comes from outside, on the emulator; then Step back and this line go back.";
      return;
    }
    const [from, to, now] = ["from", "to", "now"].map((name) => Number(history[name]));
    if (this.pending) {
      this.stops.set(now, this.pending);
      if (this.stops.size > 100) this.stops.delete(this.stops.keys().next().value);
      this.pending = null;
    }
    Object.assign(this.slider, { min: from, max: Math.max(to, from), step: 1 });
    if (document.activeElement !== this.slider || this.now !== now) this.slider.value = now;
    this.now = now;
    this.label.textContent = grouped(now);
    this.about.textContent = `of ${grouped(from)} to ${grouped(to)}; ${history.checkpoints} checkpoint${history.checkpoints === "1" ? "" : "s"}, ${bytes(Number(history.bytes))}${history.past === "yes" ? "; in the past" : ""}${history.note ? `; ${history.note}` : ""}`;
    const mark = (place, kind, title) => {
      const one = button("", title, () => this.go(place), { class: `mark ${kind}`, tabindex: kind === "stop" ? "0" : "-1" });
      one.style.left = `${to > from ? (place - from) / (to - from) * 100 : 0}%`;
      return one;
    };
    const places = (history.places ?? "").split(" ").filter(Boolean).map(Number);
    this.marks.replaceChildren(
      ...places.map((place) => mark(place, "checkpoint", `Checkpoint at ${grouped(place)}`)),
      ...[...this.stops].filter(([place]) => place >= from && place <= to).map(([place, exit]) => mark(place, "stop", `${grouped(place)}: ${exit}`)));
  }
}
