/* The table of runs: sort, filter, and each run's config opened in place. */
(() => {
  "use strict";
  const n = JSON.parse(document.getElementById("numbers").textContent);
  const table = document.getElementById("run-table"), body = table.tBodies[0];
  const rows = [...body.rows];

  const key = cell => {
    const text = cell.dataset.value ?? cell.textContent.trim(), number = Number(text);
    return text === "" || text === "-" ? null : Number.isNaN(number) ? text : number;
  };
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.closest("th"), up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th[aria-sort]").forEach(th => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => {
        const [x, y] = [key(a.cells[column]), key(b.cells[column])];
        if (x === null || y === null) return (x === null) - (y === null); // missing numbers stay at the end
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return up ? order : -order;
      });
      place();
    });
  });
  function place() {
    rows.forEach(row => { body.append(row); if (row.detail) body.append(row.detail); });
  }

  const filter = document.getElementById("filter"), total = document.getElementById("filter-count");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach(row => {
      const cells = [...row.cells].map(cell => cell.textContent.toLowerCase());
      const hit = words.every(word => cells.some(cell => /^[\d.e-]+$/.test(word) ? cell.trim() === word : cell.includes(word)));
      row.hidden = !hit;
      if (row.detail) row.detail.hidden = !hit;
      shown += hit;
    });
    total.textContent = words.length ? `${shown} of ${rows.length} runs` : `${rows.length} runs`;
  });

  function config(run) {
    const own = n.settings.by_run[run], list = document.createElement("dl");
    list.className = "config"; list.dataset.testid = "config";
    if (!own) { list.textContent = "No folder yet."; return list; }
    const all = { ...n.settings.common, ...own };
    Object.keys(all).sort((a, b) => a.split(".").length - b.split(".").length || (a < b ? -1 : 1)).forEach(name => {
      const item = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = typeof all[name] === "string" ? all[name] : JSON.stringify(all[name]);
      if (name in own) item.className = "own";
      item.append(dt, dd); list.append(item);
    });
    return list;
  }
  rows.forEach(row => {
    const button = row.querySelector(".open");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) { row.detail.remove(); row.detail = null; return; }
      const detail = document.createElement("tr"), cell = document.createElement("td");
      detail.className = "detail"; cell.colSpan = row.cells.length; cell.append(config(row.dataset.run));
      detail.append(cell); row.after(detail); row.detail = detail;
      detail.scrollIntoView({ block: "nearest" });
    });
  });
})();
