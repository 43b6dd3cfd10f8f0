"use strict";
(() => {
  // Sorts, filters and shortens the table of layers. Without this script the table is whole.
  const AT_FIRST = window.matchMedia("(max-width: 1240px)").matches ? 8 : 16;
  const table = document.querySelector(".layers");
  if (!table) return;
  document.documentElement.classList.add("js");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const [role, reason, text, order, more, shown] =
    ["role", "reason", "text", "order", "more", "shown"].map((id) => document.getElementById(id));
  let all = false;

  const matches = (row) => {
    const [topic, group] = reason.value.split(":");
    return (!role.value || row.dataset.role === role.value)
      && (!topic || row.dataset[topic] === group)
      && (!text.value || row.textContent.toLowerCase().includes(text.value.toLowerCase()));
  };
  const show = () => {
    let count = 0;
    for (const row of body.rows) {
      const matching = matches(row);
      count += matching;
      row.hidden = !matching || (!all && count > AT_FIRST);
    }
    shown.textContent = count === rows.length ? `${count} layers` : `${count} of ${rows.length} layers`;
    more.hidden = all || count <= AT_FIRST;
    more.textContent = `Show all ${count} layers`;
  };
  const sort = (column, descending) => {
    const key = (row) => row.cells[column].dataset.sort;
    const numeric = rows.every((row) => key(row) !== "" && !Number.isNaN(Number(key(row))));
    const sign = descending ? -1 : 1;
    rows.sort((a, b) => sign * (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true })));
    body.append(...rows);
    for (const header of table.tHead.rows[0].cells) {
      if (header.hasAttribute("aria-sort")) header.setAttribute("aria-sort", "none");
    }
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    show();
  };

  for (const control of [role, reason, text]) control.addEventListener("input", show);
  more.addEventListener("click", () => { all = true; show(); });
  order.addEventListener("input", () => {
    const [column, direction] = order.value.split(" ");
    sort(Number(column), direction === "descending");
  });
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      sort(header.cellIndex, header.getAttribute("aria-sort") === "ascending");
    });
  }
  for (const button of document.querySelectorAll("[data-reason]")) {
    button.addEventListener("click", () => {
      reason.value = button.dataset.reason;
      role.value = text.value = "";
      all = true;
      show();
      document.getElementById("layers").scrollIntoView();
    });
  }
  show();
})();
