// Sorting and filtering of the rows that the server made.
const table = (() => {
  const list = listing({read: (row) => `${row.cells[2].textContent} ${row.cells[3].textContent}`, troubled: (row) => +row.cells[1].dataset.v > 1, then: () => detail.place()});
  sorting(list.body, list.heads, {
    // words and ranks start with the smallest, measures with the worst
    down: (column, head) => column === 1 || column >= 4 && !["sqnr", "sqnr-channel", "lev", "gain"].some((name) => head.classList.contains(name)),
    then(column, down) {
      $("#layers-title").textContent = column === 0 ? (down ? "Layers, best first" : "Layers, worst first") : "Layers";
      detail.place();
    },
  });
  return list;
})();
