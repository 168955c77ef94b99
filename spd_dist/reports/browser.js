"use strict";
// Shows one completion at a time: what models and data say is only ever set as text.
(() => {
  const text = (id) => document.getElementById(id).textContent;
  const head = JSON.parse(text("completions-head"));
  const section = document.getElementById("completions");
  const number = document.getElementById("completions-number");
  const find = document.getElementById("completions-find");
  const coloured = document.getElementById("completions-coloured");
  const place = document.getElementById("completions-place");
  const shown = document.getElementById("completions-shown");
  const NATS = 1000;
  const LEVELS = [0.1, 0.5, 1.5, 3];
  const blocks = new Map();
  let chosen = [];
  let position = 0;

  const row = (index) => {
    const block = Math.floor(index / head.rows_a_block);
    if (!blocks.has(block)) blocks.set(block, JSON.parse(text(`completions-${block}`)));
    return blocks.get(block)[index % head.rows_a_block];
  };

  const make = (name, words, kind) => {
    const element = document.createElement(name);
    if (words !== undefined) element.textContent = words;
    if (kind) element.className = kind;
    return element;
  };

  const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(3);

  const level = (change) => {
    const size = LEVELS.filter((least) => Math.abs(change) >= least).length;
    return size ? `${change > 0 ? "up" : "down"}${size}` : "";
  };

  const strongest = (entry) => {
    const table = make("table");
    const names = make("tr");
    for (const name of ["token", "base", "projected", "change"]) names.append(make("th", name));
    table.append(make("thead"), make("tbody"));
    table.tHead.append(names);
    const order = entry.change.map((_, index) => index);
    order.sort((a, b) => Math.abs(entry.change[b]) - Math.abs(entry.change[a]) || a - b);
    for (const index of order.slice(0, 5)) {
      const line = make("tr");
      const [base, change] = [entry.base[index] / NATS, entry.change[index] / NATS];
      line.append(make("td", `${index + 1}: ${JSON.stringify(entry.pieces[index])}`, "text"));
      for (const value of [base.toFixed(3), (base - change).toFixed(3), signed(change)]) line.append(make("td", value));
      table.tBodies[0].append(line);
    }
    return table;
  };

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length) / NATS;

  const column = (name, entry) => {
    const cell = make("div");
    cell.append(make("strong", name));
    if (!entry) {
      cell.append(make("p", "it has none of this prompt and sample", "small"));
      return cell;
    }
    cell.append(make("span", ` ${entry.num_tokens} tokens, ${entry.finish_reason}`, "small"));
    const written = make("pre");
    written.dir = "auto";
    cell.append(written);
    if (!entry.pieces) {
      written.textContent = entry.text;
      return cell;
    }
    entry.pieces.forEach((piece, index) => {
      const change = entry.change[index] / NATS;
      const token = make("span", piece, level(change));
      token.title = `${signed(change)} nats`;
      written.append(token);
    });
    const [base, change] = [mean(entry.base), mean(entry.change)];
    const words = `nats a token: base ${base.toFixed(3)}, projected ${(base - change).toFixed(3)}; the largest changes:`;
    cell.append(make("p", words, "small"), strongest(entry));
    return cell;
  };

  const show = (wanted) => {
    position = Math.min(Math.max(0, wanted), chosen.length - 1);
    number.max = chosen.length;
    shown.replaceChildren();
    if (!chosen.length) {
      place.textContent = "none of this id";
      return;
    }
    number.value = position + 1;
    const [id, sample] = head.keys[chosen[position]];
    place.textContent = `of ${chosen.length}: ${id}${head.has_samples ? `, sample ${sample}` : ""}`;
    const { question, arms } = row(chosen[position]);
    if (question) {
      const asked = make("pre", question, "asked");
      asked.dir = "auto";
      shown.append(asked);
    }
    const columns = make("div", undefined, "answers");
    arms.forEach((entry, index) => columns.append(column(head.arms[index], entry)));
    shown.append(columns);
  };

  const choose = () => {
    const wanted = find.value.trim().toLowerCase();
    const all = coloured.checked ? head.coloured : head.keys.map((_, index) => index);
    chosen = wanted ? all.filter((index) => head.keys[index][0].toLowerCase().includes(wanted)) : all;
    show(0);
  };

  const steps = {
    ArrowLeft: () => position - 1,
    ArrowRight: () => position + 1,
    Home: () => 0,
    End: () => chosen.length - 1,
  };

  section.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(step());
  });
  document.getElementById("completions-before").addEventListener("click", () => show(position - 1));
  document.getElementById("completions-after").addEventListener("click", () => show(position + 1));
  number.addEventListener("change", () => show(Math.trunc(Number(number.value)) - 1 || 0));
  find.addEventListener("input", choose);
  coloured.addEventListener("change", choose);
  coloured.checked = head.coloured.length > 0;
  coloured.disabled = !head.coloured.length;
  choose();
})();
