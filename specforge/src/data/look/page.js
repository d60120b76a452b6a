"use strict";
(() => {
  const all = [...document.querySelectorAll("article")];
  const list = document.getElementById("documents");
  const field = (id) => document.getElementById(id);
  const text = new Map(all.map((one) => [one, one.textContent.toLowerCase()]));
  const number = (id, otherwise) => {
    const value = field(id).value.trim();
    return value === "" || Number.isNaN(Number(value)) ? otherwise : Number(value);
  };
  const orders = {
    file: (one, two) => one.dataset.place - two.dataset.place,
    longest: (one, two) => two.dataset.length - one.dataset.length,
    shortest: (one, two) => one.dataset.length - two.dataset.length,
    most: (one, two) => two.dataset.coverage - one.dataset.coverage,
    least: (one, two) => one.dataset.coverage - two.dataset.coverage,
  };
  const filter = () => {
    const words = field("search").value.toLowerCase();
    const [shortest, longest] = [number("length-from", 0), number("length-to", Infinity)];
    const [least, most] = [number("coverage-from", 0), number("coverage-to", 100)];
    const roles = [...document.querySelectorAll("input[name=role]:checked")].map((box) => box.value);
    let shown = 0;
    for (const one of all) {
      const length = Number(one.dataset.length);
      const share = 100 * Number(one.dataset.coverage);
      const speakers = one.dataset.roles.split(" ");
      const fits =
        length >= shortest && length <= longest && share >= least && share <= most &&
        roles.every((role) => speakers.includes(role)) && text.get(one).includes(words);
      one.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    field("shown").textContent = shown + " of " + all.length + " shown";
    field("nothing").hidden = shown > 0;
  };
  const sort = () => {
    all.sort(orders[field("order").value] || orders.file);
    list.append(...all);
  };
  // An address such as page.html#search=bread&role=tool&order=longest opens the page with these filters.
  const take = () => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    field("filters").reset();
    for (const [name, value] of wanted) {
      const boxes = [...document.querySelectorAll("input[name=role]")];
      if (name === "role") boxes.filter((box) => box.value === value).forEach((box) => { box.checked = true; });
      else if (["search", "order"].includes(name) || /^(length|coverage)-(from|to)$/.test(name)) field(name).value = value;
    }
    sort();
    filter();
  };
  field("filters").addEventListener("input", filter);
  field("filters").addEventListener("submit", (event) => event.preventDefault());
  field("filters").addEventListener("reset", () => setTimeout(() => { sort(); filter(); }));
  window.addEventListener("hashchange", take);
  field("order").addEventListener("change", sort);
  for (const one of all) {
    const body = one.querySelector("pre");
    if (body.scrollHeight <= body.clientHeight + 4) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "more";
    button.textContent = "show all of it";
    button.addEventListener("click", () => {
      button.textContent = one.classList.toggle("open") ? "show less" : "show all of it";
    });
    one.append(button);
  }
  take();
})();
