/* A table of pictures for each prompt: checkpoints across, strengths down. */
const content = JSON.parse(document.getElementById("content").textContent);
document.title = content.title;

function head() {
  const best = content.best ? make("span", "pill good", content.best) : null;
  main.append(make("div", "row", make("h1", "", content.title), best), make("p", "soft small break", content.about));
  const size = make("input", "");
  size.type = "range"; size.min = 5; size.max = 28; size.step = .5; size.value = matchMedia("(max-width: 40rem)").matches ? 7 : 11;
  size.setAttribute("aria-label", "Size of the pictures");
  const apply = () => main.style.setProperty("--cell", size.value + "rem");
  size.addEventListener("input", apply);
  apply();
  main.append(make("div", "slider size", make("span", "small soft", "size"), size));
  for (const note of content.notes) main.append(make("p", "small soft break", note));
}

function table(prompt) {
  const several = content.strengths.length > 1;
  const names = content.columns.map(column => make("th", column.is_best ? "best small" : "small", column.name + (column.is_best ? " ★" : "")));
  const rows = content.strengths.map((strength, row) => make("tr", "", several ? make("th", "small", "strength " + strength) : null, ...content.columns.filter(column => column.name !== "base" || !row).map(column => {
    const cell = make("td", ""), source = prompt.pictures[column.name] || prompt.pictures[column.name + " " + strength];
    if (column.name === "base") cell.rowSpan = content.strengths.length;
    if (!source) { cell.append(make("span", "soft small", "not made")); return cell; }
    const title = column.name + (column.name === "base" ? "" : ", strength " + strength), image = picture(source, title + ": " + prompt.text);
    image.tabIndex = 0;
    const open = () => look(source, title, { prompt: prompt.text, seed: prompt.seed, size: prompt.size });
    image.addEventListener("click", open);
    image.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
    cell.append(image);
    return cell;
  })));
  const body = make("table", "", make("thead", "", make("tr", "", several ? make("th", "") : null, ...names)), make("tbody", "", ...rows));
  const section = panel("", make("h3", "break", prompt.text || "(no prompt)"), make("p", "soft small", "seed " + prompt.seed + ", " + prompt.size), make("div", "matrix", body));
  main.append(section);
}

head();
content.prompts.forEach(table);
