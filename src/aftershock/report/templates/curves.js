/* Curves over training: per arm one column, loss above, the chosen signal below; time axis and cursor shared. */
(() => {
  "use strict";
  const n = JSON.parse(document.getElementById("numbers").textContent);
  const host = document.getElementById("explorer");
  if (!host || !n.series.names.length) return;
  const $ = id => document.getElementById(id);
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const RAMPS = { // low to high rate; lightness is monotonic, so the order also survives without colour vision
    light: ["#14146e", "#4b1c96", "#8a2496", "#b93c78", "#d2604a", "#d88a1c"],
    dark: ["#7f7bf5", "#a875f2", "#d272d6", "#f07fa4", "#f8a273", "#f5d467"],
  };
  const darkMode = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => darkMode.matches && !document.documentElement.hasAttribute("data-print");
  const arms = n.arms.map(a => a.arm), sizes = n.sizes.map(s => s.size);
  const recorded = n.runs.filter(r => n.series.runs[r.run_id]);
  const names = n.series.names;
  const lossName = names.includes(n.series.loss) ? n.series.loss : names[0];
  const state = {
    size: [...sizes].reverse().find(s => recorded.some(r => r.size === s)) || sizes[0],
    arm: new Set(arms.slice(0, 4)), rate: new Set(n.rates), seed: new Set(n.seeds),
    signal: names.includes(n.series.logit) ? n.series.logit : names[Math.min(1, names.length - 1)],
    log: null, zoom: null,
  };
  let plots = [];

  const rateText = v => v >= 0.01 ? String(+v.toPrecision(6)) : v.toExponential().replace("e-0", "e-");
  function valueText(v) {
    if (v === null || v === undefined) return "not finite";
    const a = Math.abs(v);
    return a !== 0 && (a >= 1e4 || a < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
  }
  function rateColour(rate) {
    const ramp = RAMPS[isDark() ? "dark" : "light"], last = n.rates.length - 1;
    const at = last ? n.rates.indexOf(rate) / last * (ramp.length - 1) : 0;
    const i = Math.min(Math.floor(at), ramp.length - 2), part = at - i;
    const rgb = hex => [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16));
    const [a, b] = [rgb(ramp[i]), rgb(ramp[i + 1])];
    return `rgb(${a.map((x, k) => Math.round(x + (b[k] - x) * part)).join(" ")})`;
  }
  function seriesOf(run, name) {
    const own = n.series.runs[run.run_id], found = own && own.signals[name];
    return found ? [own.grids[found[0]], found[1]] : null;
  }

  /* ---- controls ---- */
  function option(parent, value, text) {
    const el = document.createElement("option");
    el.value = value; el.textContent = text; parent.append(el);
  }
  sizes.forEach(s => option($("pick-size"), s, s));
  $("pick-size").value = state.size;
  const kinds = new Map();
  names.forEach(name => { const kind = name.split("/")[0]; kinds.set(kind, [...(kinds.get(kind) || []), name]); });
  kinds.forEach((members, kind) => {
    const group = document.createElement("optgroup");
    group.label = kind; members.forEach(name => option(group, name, name)); $("pick-signal").append(group);
  });
  $("pick-signal").value = state.signal;
  function chips(key, values, text) {
    const box = $("pick-" + key);
    values.forEach(value => {
      const chip = document.createElement("button");
      chip.type = "button";
      if (key === "rate") chip.append(document.createElement("i"));
      chip.append(text(value));
      chip.addEventListener("click", () => {
        const on = state[key];
        if (on.size === values.length && values.length > 1) { on.clear(); on.add(value); }
        else if (on.has(value)) on.delete(value); else on.add(value);
        if (!on.size) values.forEach(v => on.add(v));
        paintChips(); draw();
      });
      chip.paint = () => {
        chip.setAttribute("aria-pressed", String(state[key].has(value)));
        if (key === "rate") chip.style.setProperty("--rate", rateColour(value));
      };
      chip.title = "Show only this; click more to add them";
      box.append(chip);
    });
  }
  chips("arm", arms, String); chips("rate", n.rates, rateText); chips("seed", n.seeds, String);
  function paintChips() { document.querySelectorAll("#controls .chips button").forEach(chip => chip.paint()); }
  $("pick-size").addEventListener("change", e => { state.size = e.target.value; draw(); });
  $("pick-signal").addEventListener("change", e => { state.signal = e.target.value; state.log = null; draw(); });
  $("pick-log").addEventListener("change", e => { state.log = e.target.checked; draw(); });
  $("controls").addEventListener("submit", e => e.preventDefault());

  /* ---- scales shared by all columns ---- */
  function extent(runs, name) {
    let low = Infinity, high = -Infinity, top = -Infinity, steps = 1;
    runs.forEach(run => {
      const own = seriesOf(run, name);
      if (!own) return;
      own[1].forEach(v => { if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); } });
      steps = Math.max(steps, own[0][own[0].length - 1] || 1);
    });
    if (name === lossName) {
      const starts = n.groups.filter(g => g.size === state.size && g.l0 !== null).map(g => g.l0);
      if (starts.length) { top = 1.2 * Math.max(...starts); }
    }
    const cut = top > 0 && high > top;
    return { low, high: cut ? top : high, cut, steps, empty: low > high };
  }
  function scaleOf(range, log) {
    if (range.empty) return { low: 0, high: 1, log: false };
    if (log) return { low: range.low / 1.2, high: range.high * 1.2, log: true };
    const pad = 0.05 * (range.high - range.low || Math.abs(range.high) || 1);
    return { low: range.low - pad, high: range.high + pad, log: false };
  }

  function decades(scale) { // powers of ten, with 2 and 5 between them where that would leave fewer than three
    const list = steps => {
      const out = [];
      for (let e = Math.floor(Math.log10(scale.low)); e <= Math.log10(scale.high); e++)
        steps.forEach(m => { const v = m * 10 ** e; if (v >= scale.low && v <= scale.high) out.push(+v.toPrecision(6)); });
      return out;
    };
    return list([1]).length > 2 ? list([1]) : list([1, 2, 5]);
  }

  /* ---- one chart ---- */
  function chart(parent, runs, name, title, scale, steps) {
    const box = document.createElement("div"), head = document.createElement("h3"), readout = document.createElement("p");
    box.className = "plot"; head.textContent = title; readout.className = "readout";
    readout.setAttribute("aria-live", "polite");
    const shown = runs.filter(run => seriesOf(run, name));
    parent.append(head, box, readout);
    if (!shown.length) { readout.textContent = "Nothing recorded for this choice."; return; }
    const data = uPlot.join(shown.map(run => seriesOf(run, name)));
    const axis = { stroke: css("--soft"), grid: { stroke: css("--hair"), width: 1 }, ticks: { stroke: css("--faint"), width: 1, size: 4 }, font: "11.5px " + css("--sans") };
    const u = new uPlot({
      width: Math.max(box.clientWidth, 200), height: 216, legend: { show: false },
      padding: [8, 10, 0, 0],
      cursor: {
        sync: { key: "steps", setSeries: false, scales: ["x", null] }, focus: { prox: 1e6 },
        drag: { x: true, y: false, setScale: false }, points: { size: 6 }, y: false,
      },
      focus: { alpha: 0.25 },
      scales: {
        x: { time: false, range: () => state.zoom || [0, steps] },
        y: { distr: scale.log ? 3 : 1, range: () => [scale.low, scale.high] },
      },
      axes: [
        { ...axis, size: 28, gap: 3, values: (_, ticks) => ticks.map(v => v >= 1e5 ? v.toExponential(0) : v) },
        { ...axis, size: 50, gap: 4, splits: scale.log ? () => decades(scale) : undefined, values: (_, ticks) => ticks.map(v => v === null ? "" : scale.log && (v >= 1e3 || v < 0.01) ? v.toExponential(0).replace("+", "") : valueText(v)) },
      ],
      series: [{}, ...shown.map(run => ({
        label: run.run_id, stroke: rateColour(run.lr), width: 1.4, spanGaps: true, points: { show: false },
      }))],
      hooks: {
        draw: [u => crosses(u, shown)],
        setSelect: [u => { if (u.select.width > 6) zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]); u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false); }],
        setCursor: [u => say(u, shown, readout)],
        setSeries: [u => say(u, shown, readout)],
      },
    }, data, box);
    u.over.addEventListener("dblclick", () => zoomTo(null));
    keys(u, box, title, shown, readout);
    new ResizeObserver(() => { if (box.clientWidth && Math.abs(box.clientWidth - u.width) > 1) u.setSize({ width: box.clientWidth, height: 216 }); }).observe(box);
    plots.push(u);
  }
  function zoomTo(range) {
    state.zoom = range;
    plots.forEach(u => u.setScale("x", { min: range ? range[0] : 0, max: range ? range[1] : 1 }));
  }
  function crosses(u, shown) {
    const { ctx } = u, r = 3.6 * devicePixelRatio;
    shown.forEach((run, i) => {
      if (run.outcome !== "diverged") return;
      let last = u.data[i + 1].length - 1;
      while (last >= 0 && (u.data[i + 1][last] === null || u.data[i + 1][last] === undefined)) last--;
      if (last < 0) return;
      const x = u.valToPos(u.data[0][last], "x", true);
      const y = Math.max(u.valToPos(u.data[i + 1][last], "y", true), u.bbox.top + r);
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
      ctx.save(); ctx.strokeStyle = css("--alarm"); ctx.lineWidth = 1.8 * devicePixelRatio;
      ctx.beginPath(); ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r); ctx.moveTo(x + r, y - r); ctx.lineTo(x - r, y + r); ctx.stroke();
      ctx.restore();
    });
  }
  function say(u, shown, readout) {
    const at = u.series.findIndex((s, i) => i && s._focus), idx = u.cursor.idx;
    if (at < 1 || idx === null || idx === undefined) { readout.textContent = ""; return; }
    const run = shown[at - 1], column = u.data[at];
    let k = idx;
    while (k > 0 && column[k] === undefined) k--;
    readout.innerHTML = "";
    const value = document.createElement("b");
    value.textContent = valueText(column[k]);
    readout.append(value, ` at step ${u.data[0][k]}, rate ${rateText(run.lr)}, seed ${run.seed}`);
  }
  function keys(u, box, title, shown, readout) {
    box.tabIndex = 0; box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${title}, ${shown.length} runs; arrow keys read values`);
    let at = 0, idx = 0;
    box.addEventListener("keydown", e => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key], turn = { ArrowUp: -1, ArrowDown: 1 }[e.key];
      if (e.key === "Escape") { zoomTo(null); return; }
      if (!step && !turn) return;
      e.preventDefault();
      at = (at + (turn || 0) + shown.length) % shown.length;
      const column = u.data[at + 1];
      idx = Math.min(Math.max(idx + (step || 0), 0), column.length - 1);
      while (step && idx > 0 && idx < column.length - 1 && column[idx] === undefined) idx += step;
      u.setCursor({ left: u.valToPos(u.data[0][idx], "x"), top: u.valToPos(column[idx] || 0, "y") });
      u.setSeries(at + 1, { focus: true });
      say(u, shown, readout);
    });
  }

  function draw() {
    plots.forEach(u => u.destroy());
    plots = []; host.replaceChildren();
    const chosen = recorded.filter(r => r.size === state.size && state.rate.has(r.lr) && state.seed.has(r.seed) && state.arm.has(r.arm));
    const same = state.signal === lossName, loss = extent(chosen, lossName), signal = extent(chosen, state.signal);
    if (state.log === null) state.log = !signal.empty && signal.low > 0 && signal.high / signal.low > 50;
    const able = !signal.empty && signal.low > 0;
    $("pick-log").checked = state.log && able; $("pick-log").disabled = !able;
    const steps = Math.max(loss.steps, signal.steps);
    const lossScale = scaleOf(loss, same && state.log && able), signalScale = scaleOf(signal, state.log && able);
    arms.filter(arm => state.arm.has(arm)).forEach(arm => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), strong = document.createElement("b");
      const runs = chosen.filter(r => r.arm === arm);
      strong.textContent = arm; caption.append(strong, ` ${state.size}`); figure.append(caption); host.append(figure);
      chart(figure, runs, lossName, lossName + (loss.cut ? ", cut off at 1.2 times the initial loss" : ""), lossScale, steps);
      if (!same) chart(figure, runs, state.signal, state.signal, signalScale, steps);
    });
  }
  const repaint = () => { paintChips(); draw(); };
  darkMode.addEventListener("change", repaint);
  addEventListener("beforeprint", () => { document.documentElement.setAttribute("data-print", ""); repaint(); });
  addEventListener("afterprint", () => { document.documentElement.removeAttribute("data-print"); repaint(); });
  repaint();
})();
