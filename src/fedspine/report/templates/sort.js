for (const table of document.querySelectorAll("table.sort")) table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th"), column = head?.cellIndex, body = table.tBodies[0];
  if (!head) return;
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const key = row => row.cells[column].dataset.value, sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((one, two) => {
    const a = key(one), b = key(two);  // what has no number stays last, whichever way
    return a === undefined || b === undefined ? (a === undefined) - (b === undefined) : sign * compare(a, b);
  }));
});
