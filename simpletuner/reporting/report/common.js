/* What both pages are made of. Every text of a user goes through textContent, so that nothing in it is markup. */
const main = document.getElementById("main"), closer = document.getElementById("closer");

function make(tag, classes, ...children) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}
function press(label, action, classes) {
  const node = make("button", classes || "plain", label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}
function drawn(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function panel(title, ...children) { return make("section", "panel", title ? make("h2", "", title) : null, ...children); }

const many = (count, one, more) => count.toLocaleString("en") + " " + (count === 1 ? one : more || one + "s");
function short(value) {
  const size = Math.abs(value);
  if (!size) return "0";
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}
function lasting(seconds) {
  const whole = Math.round(seconds);
  if (whole < 1) return seconds.toFixed(1) + " s";
  if (whole < 60) return whole + " s";
  if (whole < 3600) return Math.floor(whole / 60) + " min " + String(whole % 60).padStart(2, "0") + " s";
  return Math.floor(whole / 3600) + " h " + String(Math.floor(whole % 3600 / 60)).padStart(2, "0") + " min";
}
const gigabytes = bytes => (bytes / 1e9 >= 10 ? (bytes / 1e9).toFixed(0) : (bytes / 1e9).toFixed(bytes < 1e9 ? 2 : 1)) + " GB";

function picture(source, alternative) {
  const image = make("img", "");
  image.alt = alternative;
  image.decoding = "async";
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 160));
  image.src = source;
  return image;
}
function look(source, title, facts) {
  const rows = Object.entries(facts).filter(([, value]) => value !== "").map(([key, value]) => make("div", "small break", make("span", "soft", key.replaceAll("_", " ") + ": "), value));
  closer.replaceChildren(make("div", "row", make("h3", "break", title), press("close", () => closer.close())), picture(source, title), ...rows);
  closer.showModal();
}
closer.addEventListener("click", event => { if (event.target === closer) closer.close(); });

function command(text) {
  const button = press("copy", async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; } catch { getSelection().selectAllChildren(code); button.textContent = "selected"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  const code = make("code", "", text);
  return make("div", "command", code, button);
}
