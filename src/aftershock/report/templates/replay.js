/* The figure of the loss: choose curves, and read them by pointer or arrow keys. */
(() => {
  "use strict";
  const n = JSON.parse(document.getElementById("numbers").textContent);
  const host = document.getElementById("loss-figure"), svg = host.querySelector("svg");
  const cursor = document.getElementById("cursor"), readout = document.getElementById("readout");
  const curves = new Map([["recorded", n.recorded], ...Object.entries(n.curves)]);
  const groups = [...svg.querySelectorAll(".curve")];
  const [first, last, left, right] = ["first", "last", "left", "right"].map(key => Number(svg.dataset[key]));
  let step = n.window.onset;

  function paint(chip, drawn, on) {
    const colour = [...drawn.classList].find(name => name.startsWith("arm-"));
    chip.setAttribute("aria-pressed", String(on));
    drawn.classList.toggle("off", !on);
    if (!on || drawn.classList.contains("control") || drawn.classList.contains("sham")) return;
    // Curves that are shown together have colours of their own, as far as there are any.
    const taken = new Set(groups.filter(g => g !== drawn && g.matches(".cell:not(.off)")).map(g => g.getAttribute("class").match(/arm-\d/)[0]));
    const free = ["arm-0", "arm-1", "arm-2", "arm-3", "arm-4", "arm-5"].filter(name => !taken.has(name));
    const next = taken.has(colour) && free.length ? free[0] : colour;
    [drawn, chip].forEach(el => { el.classList.remove(colour); el.classList.add(next); });
  }
  const chips = [...document.querySelectorAll("#picks button")];
  const drawnOf = chip => groups.find(g => g.dataset.curve === chip.dataset.curve);
  chips.filter(chip => chip.getAttribute("aria-pressed") === "true").forEach(chip => paint(chip, drawnOf(chip), true));
  chips.forEach(chip => chip.addEventListener("click", () => {
    paint(chip, drawnOf(chip), chip.getAttribute("aria-pressed") !== "true");
    if (!cursor.classList.contains("off")) read();
  }));

  const text = v => v === "inf" ? "not finite" : Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
  function at(curve) { // the newest point up to the step, where the curve has begun and not ended
    let k = curve.steps.length - 1;
    while (k >= 0 && curve.steps[k] > step) k--;
    return k < 0 || curve.steps[curve.steps.length - 1] < step ? null : curve.losses[k];
  }
  function read() {
    const x = left + (step - first) / (last - first) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.classList.remove("off");
    readout.replaceChildren(`step ${step}: `);
    groups.filter(g => !g.classList.contains("off")).forEach(g => {
      const value = at(curves.get(g.dataset.curve));
      if (value === null) return;
      const item = document.createElement("span"), strong = document.createElement("b");
      strong.textContent = text(value);
      item.append(`${g.dataset.curve} `, strong); readout.append(item);
    });
  }
  const clamp = value => Math.min(Math.max(value, first), last);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    step = clamp(Math.round(first + (x - left) / (right - left) * (last - first)));
    read();
  });
  host.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!move) return;
    event.preventDefault();
    step = clamp(step + (cursor.classList.contains("off") ? 0 : move));
    read();
  });
  addEventListener("beforeprint", () => document.documentElement.setAttribute("data-print", ""));
  addEventListener("afterprint", () => document.documentElement.removeAttribute("data-print"));
})();
