// The attention page: a strength, an overview of all heads, one head's maps, one token's view.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tokens = data.tokens, size = tokens.length, area = size * size;
  const element = (id) => document.getElementById(id);
  const slider = element("slider"), overview = element("overview");
  const layers = data.layers.map((layer) => {
    const scores = new Float32Array(attention.bytes(layer.scores).buffer);
    return Array.from({ length: layer.heads }, (_, head) => scores.subarray(head * area, (head + 1) * area));
  });
  const dense = layers.map((heads) => heads.map((scores) => attention.weights(scores, size, size, null)));
  let sparse = [], keeps = [], layer = 0, head = 0, query = 0;

  function bits(text, heads) {
    const packed = attention.bytes(text);
    return Array.from({ length: heads }, (_, number) =>
      Uint8Array.from({ length: area }, (_, place) => {
        const bit = number * area + place;
        return (packed[bit >> 3] >> (bit & 7)) & 1;
      }));
  }

  function select() {
    const level = data.levels.length ? data.levels[Number(slider.value)] : null;
    const sparsity = Number(slider.value) / 100;
    keeps = layers.map((heads, number) => level
      ? bits(level.keep[number], heads.length)
      : heads.map((scores) => attention.survivors(scores, size, size, data.rule, sparsity, data.minKeep)));
    sparse = layers.map((heads, number) => {
      if (level && level.weights) {
        const read = Float32Array.from(attention.bytes(level.weights[number]), (byte) => byte / 255);
        return heads.map((_, place) => read.subarray(place * area, (place + 1) * area));
      }
      return heads.map((scores, place) => attention.weights(scores, size, size, keeps[number][place]));
    });
    element("requested").textContent = level ? level.label : `${slider.value}%`;
    slider.setAttribute("aria-valuetext", element("requested").textContent);
  }

  function realised(pairs) {
    const [removed, valid] = pairs.reduce((sum, [r, v]) => [sum[0] + r, sum[1] + v], [0, 0]);
    return `${(100 * removed / valid).toFixed(1)}%`;
  }

  function counts(number) {
    return layers[number].map((scores, place) => attention.count(scores, keeps[number][place]));
  }

  function build() {
    const widest = Math.max(...layers.map((heads) => heads.length));
    const top = overview.createTHead().insertRow();
    top.append(cell("th", "head"), ...Array.from({ length: widest }, (_, place) => cell("th", place + 1, "col")));
    const body = overview.createTBody();
    layers.forEach((heads, number) => {
      const row = body.insertRow();
      const name = cell("th", `layer ${number + 1} `, "row");
      name.append(cell("span", ""));
      name.lastChild.className = "share";
      row.append(name);
      heads.forEach((_, place) => {
        const button = document.createElement("button");
        button.type = "button";
        button.append(document.createElement("canvas"));
        button.addEventListener("click", () => { layer = number; head = place; show(); });
        row.insertCell().append(button);
      });
    });
    element("choose").append(...tokens.map((token, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = token;
      button.addEventListener("click", () => { query = place; show(); });
      return button;
    }));
  }

  function cell(kind, text, scope) {
    const made = document.createElement(kind);
    made.textContent = text;
    if (scope) made.scope = scope;
    return made;
  }

  function drawOverview(palette) {
    const side = document.querySelector("input[name=side]:checked").value;
    [...overview.tBodies[0].rows].forEach((row, number) => {
      row.querySelector(".share").textContent = realised(counts(number));
      row.querySelectorAll("button").forEach((button, place) => {
        const values = (side === "dense" ? dense : sparse)[number][place];
        attention.draw(button.firstChild, values, size, size, 1, side === "dense" ? null : keeps[number][place], palette);
        const own = realised([attention.count(layers[number][place], keeps[number][place])]);
        button.setAttribute("aria-label", `Layer ${number + 1}, head ${place + 1}, ${own} removed`);
      });
    });
    element("realised").textContent = `realised: ${realised(layers.flatMap((_, number) => counts(number)))} of all pairs removed`;
  }

  function drawHead(palette) {
    element("chosen").textContent = `Layer ${layer + 1}, head ${head + 1}`;
    element("head-realised").textContent =
      `${data.layers[layer].name}: ${realised([attention.count(layers[layer][head], keeps[layer][head])])} of this head's pairs removed`;
    // As large as fits beside the labels, where a phone can hold it.
    const side = Math.max(7, Math.min(size > 48 ? 9 : 16, Math.floor((document.body.clientWidth - 120) / size)));
    document.querySelectorAll(".map").forEach((map) => {
      const isDense = map.dataset.side === "dense";
      [["keys", "width"], ["queries", "height"]].forEach(([name, way]) => {
        map.querySelector(`.${name}`).replaceChildren(...tokens.map((token) => {
          const label = cell("span", token);
          label.style[way] = `${side}px`;
          return label;
        }));
      });
      const canvas = map.querySelector("canvas");
      attention.draw(canvas, (isDense ? dense : sparse)[layer][head], size, size, side, isDense ? null : keeps[layer][head], palette);
      canvas.setAttribute("aria-label", `${isDense ? "Dense" : "Sparse"} attention of layer ${layer + 1}, head ${head + 1}, as numbers below for one token`);
      canvas.onmousemove = (event) => {
        const key = Math.floor(event.offsetX / side), row = Math.floor(event.offsetY / side);
        if (key < size && row < size) element("read").textContent = `${tokens[row]} → ${tokens[key]}: ${said(row * size + key)}`;
      };
      canvas.onclick = (event) => { query = Math.min(size - 1, Math.floor(event.offsetY / side)); show(); };
    });
  }

  function said(place) {
    if (layers[layer][head][place] === -Infinity) return "not allowed by the model";
    const after = keeps[layer][head][place] ? sparse[layer][head][place].toFixed(3) : "removed";
    return `dense ${dense[layer][head][place].toFixed(3)}, sparse ${after}`;
  }

  function drawQuery(palette) {
    [...element("choose").children].forEach((button, place) => button.setAttribute("aria-pressed", String(place === query)));
    document.querySelectorAll("[data-looks]").forEach((line) => {
      const isDense = line.dataset.looks === "dense";
      line.replaceChildren(...tokens.map((token, key) => {
        const place = query * size + key;
        const weight = (isDense ? dense : sparse)[layer][head][place];
        const chip = document.createElement("span");
        const removed = isDense ? layers[layer][head][place] === -Infinity : !keeps[layer][head][place];
        chip.append(cell(removed ? "s" : "b", token));
        if (!removed) {
          const ground = attention.shade(palette, weight);
          chip.style.background = `rgb(${ground.join(" ")})`;
          chip.style.color = attention.luminance(ground) > 0.18 ? "#000" : "#fff";
          chip.append(cell("small", weight.toFixed(2)));
        }
        return chip;
      }));
    });
  }

  function show() {
    const palette = attention.colours();
    overview.querySelectorAll("tbody tr").forEach((row, number) =>
      row.querySelectorAll("button").forEach((button, place) =>
        button.setAttribute("aria-pressed", String(number === layer && place === head))));
    drawHead(palette);
    drawQuery(palette);
  }

  function all() {
    select();
    drawOverview(attention.colours());
    show();
  }

  slider.value = String(data.levels.length ? data.start : Math.round(100 * data.start));
  build();
  slider.addEventListener("input", all);
  document.querySelectorAll("input[name=side]").forEach((radio) => radio.addEventListener("change", () => drawOverview(attention.colours())));
  ground.onChange(all);
  all();
})();
