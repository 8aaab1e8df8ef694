// The page of `cnn2gnn serve`: ask about images, add a class, undo. Everything that comes from
// images, names and the server is set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const asked = []; // {file, url, item}
const AT_ONCE = 16; // images per request, if the server takes as many
const SHOWN = 500; // classes in the list
const UNUSUAL = 0.98; // share of images set apart from training that were nearer to it
let memory = null;
let limits = { images: AT_ONCE, bytes: Infinity }; // of a request; the server says how many, and refuses by itself

// --- the server -------------------------------------------------------------------------------

async function call(path, options = {}) {
  let response, body;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer");
  }
  try {
    body = await response.json();
  } catch {
    throw new Error(`the server answered with status ${response.status}`);
  }
  if (!response.ok && !body.answers) {
    throw new Error(body.remedy ? `${body.error} – ${body.remedy}` : body.error);
  }
  return body;
}

function edit(path, options) {
  sessionStorage.setItem("token", $("token").value);
  const headers = { Authorization: `Bearer ${$("token").value}`, ...(options.headers ?? {}) };
  return call(path, { ...options, headers });
}

function form(files) {
  const data = new FormData();
  for (const file of files) data.append("images", file, file.name);
  return data;
}

// What a file takes in a form: its bytes, and about four lines around them. A letter of its name may take nine.
const weight = (file) => file.size + 500 + 9 * file.name.length;
const FORM = 100; // the end of a form

function fits(files, most) {
  return files.length <= most && FORM + files.reduce((sum, file) => sum + weight(file), 0) <= limits.bytes;
}

function parts(images) {
  const most = Math.min(AT_ONCE, limits.images);
  const found = [];
  for (const one of images) {
    const last = found.at(-1);
    if (last && fits([...last, one].map((each) => each.file), most)) last.push(one);
    else found.push([one]);
  }
  return found;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e5 ? 3 : 1)} MB`;

// --- asking -----------------------------------------------------------------------------------

function take(files) {
  const fresh = files.map((file) => {
    const item = $("answer-template").content.cloneNode(true).firstElementChild;
    const url = URL.createObjectURL(file);
    item.querySelector(".given").src = url;
    item.querySelector(".given").alt = file.name;
    item.querySelector(".given").onerror = (event) =>
      event.target.replaceWith(element("span", "no picture", "given none"));
    item.querySelector(".name").textContent = file.name;
    return { file, url, item };
  });
  asked.unshift(...fresh);
  $("answers").prepend(...fresh.map((one) => one.item));
  return ask(fresh);
}

async function ask(images) {
  if (!images.length) return;
  let [at, answered, wrong] = [0, 0, ""];
  for (const part of parts(images)) {
    say("ask-state", `Asking… ${at} of ${images.length}`);
    at += part.length;
    try {
      if (!fits(part.map((one) => one.file), limits.images)) {
        throw new Error(`an image of ${megabytes(part[0].file.size)} is too large: a request may have ${megabytes(limits.bytes)}`);
      }
      const made = await call("/predict?top=3&neighbours=6", {
        method: "POST",
        body: form(part.map((one) => one.file)),
      });
      part.forEach((one, place) => show(one.item, made.answers[place], made.memory_version));
      answered += part.length;
    } catch (error) {
      wrong = error.message;
      for (const one of part) show(one.item, { error: `not answered: ${wrong}` });
    }
  }
  const count = `${images.length} ${images.length === 1 ? "image" : "images"}`;
  say("ask-state", wrong ? `${answered} of ${count} answered: ${wrong}` : `${count} answered`, Boolean(wrong));
  $("again").hidden = $("clear").hidden = !asked.length;
}

function show(item, answer, version) {
  const verdict = item.querySelector(".verdict");
  const [bars, rest, near] = [".bars", ".rest", ".near"].map((name) => item.querySelector(name));
  for (const part of [bars, near, rest]) part.replaceChildren();
  verdict.classList.toggle("wrong", Boolean(answer.error));
  if (answer.error) {
    verdict.textContent = answer.error;
    return;
  }
  verdict.textContent = answer.classes[0].class;
  if (answer.path === "new class") verdict.append(element("span", "added", "tag"));
  else if (answer.unusual?.distance >= UNUSUAL) {
    verdict.append(element("span", "unlike the training images", "tag"));
  }
  for (const one of answer.classes) {
    const line = element("li", "");
    const fill = element("i", "", "fill");
    fill.style.width = `${100 * one.probability}%`;
    line.append(fill, element("span", one.class), element("span", percent(one.probability)));
    bars.append(line);
  }
  if (!answer.neighbours?.length) return;
  rest.textContent = "Based on these images, by weight:";
  for (const one of answer.neighbours) {
    const line = element("li", "");
    line.title = one.key;
    line.append(picture(one, version), element("span", one.class), element("br", ""),
      element("small", percent(one.weight)));
    near.append(line);
  }
}

function picture(neighbour, version) {
  const image = element("img", "");
  image.alt = `${neighbour.class}, ${neighbour.key}`;
  image.loading = "lazy";
  image.onerror = () => image.replaceWith(element("span", "–", "none"));
  image.src = `/memory/${neighbour.row}/thumbnail?version=${version}`;
  return image;
}

// --- the memory -------------------------------------------------------------------------------

function remember(made) {
  memory = made;
  $("add").hidden = !memory.editable;
  $("undo").disabled = !memory.undo;
  const shown = memory.classes.slice(0, SHOWN);
  $("memory").textContent = memory.version === null
    ? "This model has no memory."
    : `${memory.images.toLocaleString("en")} images, version ${memory.version}`;
  $("classes").replaceChildren(...shown.map((one) => {
    const line = element("li", "");
    const name = element("span", one.class);
    if (!one.trained) name.append(element("span", "added", "tag"));
    line.append(name, element("span", one.images?.toLocaleString("en") ?? "", "count"));
    return line;
  }));
  $("names").replaceChildren(...shown.map((one) => {
    const option = element("option", "");
    option.value = one.class;
    return option;
  }));
}

async function add(event) {
  event.preventDefault();
  const files = [...$("add-files").files];
  const name = $("add-name").value.trim();
  await busy(async () => {
    if (!fits(files, limits.images)) {
      const size = files.reduce((sum, file) => sum + file.size, 0);
      throw new Error(`${files.length} images of ${megabytes(size)} are too many at once: a request may have ` +
        `${limits.images} images and ${megabytes(limits.bytes)} – add them in several steps`);
    }
    say("edit-state", `Adding ${files.length}…`);
    const path = `/memory?class=${encodeURIComponent(name)}`;
    const made = await edit(path, { method: "POST", body: form(files) });
    remember({ ...made.memory, editable: true });
    $("add-files").value = "";
    chosen();
    const unread = made.errors.length ? `, ${made.errors.length} unreadable` : "";
    say("edit-state", `${made.keys.length} added to ${name}${unread}${expected(made)}`);
    await ask(asked);
  });
}

function expected(made) {
  const trade = made.trades.find((one) => one.old_loss === made.old_loss);
  if (!trade) return "";
  const added = trade.new === null ? "" : `, added classes ${trade.new.toFixed(0)} %`;
  return `. Expected: trained classes ${trade.old.toFixed(1)} % correct (${made.old_before.toFixed(1)} % before)${added}`;
}

async function undo() {
  await busy(async () => {
    const made = await edit("/memory/undo", { method: "POST" });
    remember({ ...made.memory, editable: true });
    say("edit-state", `Undone: answers come from version ${memory.version}`);
    await ask(asked);
  });
}

async function busy(work) {
  $("add-button").disabled = $("undo").disabled = true;
  try {
    await work();
  } catch (error) {
    say("edit-state", error.message, true);
  } finally {
    $("add-button").disabled = false;
    $("undo").disabled = !memory.undo;
  }
}

function chosen() {
  const count = $("add-files").files.length;
  $("add-chosen").textContent = count
    ? `${count} ${count === 1 ? "image" : "images"} chosen`
    : "Drop its images, or choose files";
}

// --- helpers ----------------------------------------------------------------------------------

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;

function say(id, text, wrong = false) {
  $(id).textContent = text;
  $(id).classList.toggle("wrong", wrong);
}

function droppable(zone, input, changed) {
  // The input covers its zone and handles clicks, keys and drops itself; only the highlight is set here.
  for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, () => zone.classList.add("over"));
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => zone.classList.remove("over"));
  input.addEventListener("change", changed);
}

droppable($("ask-drop"), $("ask-files"), async () => {
  const files = [...$("ask-files").files];
  $("ask-files").value = "";
  await take(files);
});
droppable($("add-drop"), $("add-files"), chosen);
for (const kind of ["dragover", "drop"]) {
  // A file dropped outside a zone would replace the page.
  document.addEventListener(kind, (event) => event.target.type !== "file" && event.preventDefault());
}
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) take(files);
});
$("add-form").addEventListener("submit", add);
$("undo").addEventListener("click", undo);
$("again").addEventListener("click", () => ask(asked));
$("clear").addEventListener("click", () => {
  for (const one of asked.splice(0)) URL.revokeObjectURL(one.url);
  $("answers").replaceChildren();
  $("again").hidden = $("clear").hidden = true;
  say("ask-state", "");
  $("ask-files").focus();
});

$("token").value = sessionStorage.getItem("token") ?? "";
try {
  const [health, made] = await Promise.all([call("/healthz"), call("/memory")]);
  $("model").textContent = health.model;
  limits = made.limits;
  remember(made);
} catch (error) {
  say("state", error.message, true);
}
