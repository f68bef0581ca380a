"use strict";
// Sorting of tables, notes on points, and the walk through a photo's blocks. Needs no network and no library.

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const body = table.tBodies[0], numbers = heading.classList.contains("number");
    const compare = (a, b) => numbers ? a - b : a.localeCompare(b);
    const rows = [...body.rows].sort((a, b) => {
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");  // unknown last
      return compare(value(a), value(b)) * (down ? -1 : 1);
    });
    body.append(...rows);
  }));
}

const tip = document.getElementById("tip");
for (const point of tip ? document.querySelectorAll(".point") : []) {
  const show = () => {
    tip.textContent = point.dataset.about;
    tip.hidden = false;
    const mark = point.querySelector("circle").getBoundingClientRect();
    const left = Math.min(mark.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + scrollX + "px";
    tip.style.top = mark.bottom + 8 + scrollY + "px";
  };
  const hide = () => { tip.hidden = true; };
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
  point.addEventListener("mouseleave", hide);
  point.addEventListener("blur", hide);
}
document.addEventListener("keydown", event => { if (event.key === "Escape" && tip) tip.hidden = true; });

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

if (document.getElementById("data")) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = name => document.getElementById(name);
  const canvas = at("patches"), slider = at("block"), choice = at("model"), buttons = [...document.querySelectorAll("#strip button")];
  const pictures = new Map(), levels = new Map();
  const state = { model: 0, photo: 0, block: 0, patch: 0 };
  let drawing = 0;

  const element = (name, text, style) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (style) made.className = style;
    return made;
  };
  const picture = source => {
    if (!pictures.has(source)) {
      const image = new Image();
      image.src = source;
      pictures.set(source, image.decode().then(() => image));
    }
    return pictures.get(source);
  };
  // The values of a map, from 0 to 255, row by row: a query each.
  const values = async number => {
    if (!levels.has(number)) {
      const image = await picture(data.maps[number]);
      const sheet = document.createElement("canvas");
      sheet.width = image.width;
      sheet.height = image.height;
      const pen = sheet.getContext("2d", { willReadFrequently: true });
      pen.drawImage(image, 0, 0);
      const pixels = pen.getImageData(0, 0, image.width, image.height).data;
      levels.set(number, { width: image.width, of: Uint8Array.from({ length: pixels.length / 4 }, (_, place) => pixels[4 * place]) });
    }
    return levels.get(number);
  };

  const now = () => {
    const shown = data.models[state.model].photos[state.photo];
    return { shown, block: shown.blocks[state.block], rows: shown.grid[0], columns: shown.grid[1] };
  };

  function fit(sheet, image, width) {
    sheet.width = width;
    sheet.height = Math.round(width * image.height / image.width);
    const pen = sheet.getContext("2d");
    pen.drawImage(image, 0, 0, sheet.width, sheet.height);
    return pen;
  }
  // Left, top, width and height of a patch, on whole pixels so that neighbours leave no gap.
  function corners(sheet, patch) {
    const { rows, columns } = now(), row = Math.floor(patch / columns), column = patch % columns;
    const x = Math.round(column * sheet.width / columns), y = Math.round(row * sheet.height / rows);
    const right = Math.round((column + 1) * sheet.width / columns), bottom = Math.round((row + 1) * sheet.height / rows);
    return [x, y, right - x, bottom - y];
  }
  function mark(pen, sheet, patch) {
    const [x, y, width, height] = corners(sheet, patch);
    const line = Math.max(1.5, sheet.width / 150);
    pen.lineWidth = 2 * line; pen.strokeStyle = "#000"; pen.strokeRect(x, y, width, height);
    pen.lineWidth = line; pen.strokeStyle = "#ff9b4a"; pen.strokeRect(x, y, width, height);
  }

  function drawPatches(image) {
    const { shown, block, rows, columns } = now();
    const pen = fit(canvas, image, 448), owner = data.layouts[block.layout];
    const reduced = block.tokens < owner.length;
    for (let patch = 0; patch < owner.length; patch++) {
      if (block.out[patch] !== "1") continue;
      const [x, y, width, height] = corners(canvas, patch);
      pen.fillStyle = "rgba(255,255,255,.82)";
      pen.fillRect(x, y, width, height);
      pen.strokeStyle = "rgba(0,0,0,.35)";
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(x + 2, y + height - 2); pen.lineTo(x + width - 2, y + 2); pen.stroke();
    }
    if (reduced) {
      const gone = patch => block.out[patch] === "1";
      const mine = patch => owner[patch] === owner[state.patch] && !gone(patch) && !gone(state.patch);
      pen.fillStyle = "rgba(255,155,74,.3)";
      for (let patch = 0; patch < owner.length; patch++) if (mine(patch)) pen.fillRect(...corners(canvas, patch));
      const outline = (parts, line, colour) => {
        pen.beginPath();
        for (let patch = 0; patch < owner.length; patch++) {
          const [x, y, width, height] = corners(canvas, patch), right = patch + 1, below = patch + columns;
          if (right % columns && parts(patch, right)) {
            pen.moveTo(x + width, y); pen.lineTo(x + width, y + height);
          }
          if (below < owner.length && parts(patch, below)) {
            pen.moveTo(x, y + height); pen.lineTo(x + width, y + height);
          }
        }
        pen.lineWidth = line; pen.strokeStyle = colour; pen.stroke();
      };
      const differ = (one, other) => owner[one] !== owner[other] && !(gone(one) && gone(other));
      outline(differ, 3, "#000");
      outline(differ, 1.4, "#fff");
      outline((one, other) => mine(one) !== mine(other), 5, "#000");
      outline((one, other) => mine(one) !== mine(other), 2.5, "#ff9b4a");
    }
    mark(pen, canvas, state.patch);
    const place = `column ${state.patch % columns + 1}, row ${Math.floor(state.patch / columns) + 1}`;
    const name = data.photos[state.photo].label || data.photos[state.photo].name;
    canvas.setAttribute("aria-label", `${name}, ${rows} by ${columns} patches, after block ${state.block}`);
    const left = [...block.out].filter(bit => bit === "1").length;
    at("block-number").textContent = `${state.block} (of 0 to ${shown.blocks.length - 1})`;
    const tokens = `${block.tokens} token${block.tokens > 1 ? "s" : ""} for ${owner.length} patches`;
    at("block-text").textContent = (left && !reduced ? `${left} of ${owner.length} patches left out` :
      tokens + (left ? `, ${left} of them left out` : "")) + "." +
      (block.parts === "dense" ? "" : ` In this block: ${block.parts}.`);
    const together = owner.filter((token, patch) => token === owner[state.patch] && block.out[patch] !== "1").length;
    const fate = block.out[state.patch] === "1" ? "is left out here" :
      together > 1 ? `shares its token with ${together - 1} other${together > 2 ? "s" : ""}` : "has a token of its own";
    at("patch-text").textContent = `The chosen patch (${place}) ${fate}.`;
  }

  async function drawMaps(image, turn) {
    const { block } = now();
    const shown = block.maps.filter(found => data.layouts[found.rows][state.patch] >= 0);  // -1: left out
    const figures = await Promise.all(shown.map(async found => {
      const map = await values(found.map), rows = data.layouts[found.rows], columns = data.layouts[found.columns];
      const figure = element("figure"), sheet = element("canvas");
      const pen = fit(sheet, image, 176);
      for (let patch = 0; patch < columns.length; patch++) {
        const key = columns[patch];
        const strength = key < 0 ? 0 : map.of[rows[state.patch] * map.width + key] / 255;
        pen.fillStyle = `rgba(0,0,0,${.88 * (1 - strength)})`;
        pen.fillRect(...corners(sheet, patch));
      }
      mark(pen, sheet, state.patch);
      const title = data.titles[found.kind];
      sheet.setAttribute("role", "img");
      sheet.setAttribute("aria-label", `${title}, of the chosen patch in block ${state.block}`);
      figure.append(sheet, element("figcaption", title[0].toUpperCase() + title.slice(1)));
      return figure;
    }));
    if (turn !== drawing) return;  // something else was chosen meanwhile
    if (figures.length) at("maps").replaceChildren(...figures);
    else {
      const elsewhere = now().shown.blocks.some(other => other.maps.length);
      const text = block.maps.length ? "The chosen patch is left out here, and connected to nothing; choose another one." :
        elsewhere ? "No attention is drawn for this block; move the slider to one that offers it." :
        "No attention is drawn for this model.";
      at("maps").replaceChildren(element("p", text, "muted"));
    }
  }

  function drawUsage() {
    const { shown } = now();
    if (!shown.blocks.some(block => block.heads || block.sublayers)) return at("usage").replaceChildren();
    const heads = Math.max(...shown.blocks.map(block => block.heads ? block.heads.length : 0));
    const names = [...Array(heads).keys()].map(head => `head ${head}`);
    const parts = shown.blocks.some(block => block.sublayers) ? ["attention", "MLP"] : [];
    const table = element("table"), head = table.createTHead().insertRow();
    head.append(element("th", "block"));
    for (const block of shown.blocks.keys()) head.append(element("th", String(block)));
    const body = table.createTBody();
    [...names, ...parts].forEach((name, place) => {
      const row = body.insertRow(), title = element("th", name);
      title.scope = "row";
      row.append(title);
      shown.blocks.forEach((block, index) => {
        const used = place < heads ? !block.heads || block.heads[place] : !block.sublayers || block.sublayers[place - heads];
        const cell = element("td", undefined, (used ? "on" : "off") + (index === state.block ? " now" : ""));
        cell.append(element("span", undefined, "box"));
        cell.setAttribute("aria-label", used ? "used" : "skipped");
        row.append(cell);
      });
    });
    at("usage").replaceChildren(element("p", "Heads and sub-layers used for this photo (filled) or skipped:"), table);
  }

  function drawPredictions() {
    const { shown } = now();
    at("predictions").replaceChildren(...shown.outcomes.map(outcome => {
      const part = element("div"), list = element("ol");
      part.append(element("b", outcome.model));
      part.append(element("span", `${outcome.gmacs.toPrecision(3)} GMACs, ${outcome.ms.toPrecision(3)} ms`, "muted"));
      for (const [name, share] of outcome.top) {
        const item = element("li", `${name}, ${Math.round(100 * share)} %`), bar = element("span", undefined, `bar ${outcome.model}`);
        bar.style.width = `${Math.max(100 * share, .5)}%`;
        item.append(bar);
        list.append(item);
      }
      part.append(list);
      return part;
    }));
  }

  async function draw(everything) {
    const turn = ++drawing;
    const image = await picture(data.photos[state.photo].src);
    if (turn !== drawing) return;
    drawPatches(image);
    if (everything) drawPredictions();
    drawUsage();
    await drawMaps(image, turn);
  }
  function choosePhoto(number) {
    state.photo = number;
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
    draw(true);
  }
  function choosePatch(patch) {
    const { rows, columns } = now();
    if (patch < 0 || patch >= rows * columns) return;
    state.patch = patch;
    draw(false);
  }

  buttons.forEach((button, number) => {
    button.querySelector("img").src = data.photos[number].src;
    button.addEventListener("click", () => choosePhoto(number));
  });
  slider.addEventListener("input", () => { state.block = Number(slider.value); draw(false); });
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect(), { rows, columns } = now();
    const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
    const row = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    choosePatch(row * columns + column);
  });
  canvas.addEventListener("keydown", event => {
    const { columns } = now(), column = state.patch % columns;
    const step = { ArrowLeft: column > 0 ? -1 : 0, ArrowRight: column < columns - 1 ? 1 : 0, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choosePatch(state.patch + step);
  });
  function chooseModel(number) {
    state.model = number;
    const { shown } = now(), depth = shown.blocks.length;
    slider.max = String(depth - 1);
    state.block = Math.min(state.block, depth - 1);
    slider.value = String(state.block);
    draw(true);
  }
  if (choice) choice.addEventListener("change", () => chooseModel(choice.selectedIndex));

  // To start with, the last block, where most is left out, and of the patches that are there the one closest to the middle.
  const { shown, rows, columns } = now();
  state.block = shown.blocks.length - 1;
  const fromMiddle = patch => Math.hypot(Math.floor(patch / columns) - Math.floor(rows / 2), patch % columns - Math.floor(columns / 2));
  const patches = [...Array(rows * columns).keys()].sort((a, b) => fromMiddle(a) - fromMiddle(b));
  state.patch = patches.find(patch => now().block.out[patch] !== "1") ?? patches[0];
  chooseModel(0);
}
