// What the report and the attention page share: the threshold rule, the softmax, and drawing a map.
// A map is a matrix of `queries` rows and `keys` columns, row after row. A score of -Infinity is an invalid pair.
"use strict";

const attention = (() => {
  // Survivors among `pairs` pairs; half-way cases keep the pair. The same float64 formula as in Python.
  function keepCount(pairs, sparsity) {
    return pairs - Math.max(0, Math.ceil(pairs * sparsity - 0.5));
  }

  // The k-th largest of some values; Infinity for k = 0.
  function kthLargest(values, k) {
    if (k === 0) return Infinity;
    const ordered = Float32Array.from(values).sort();
    return ordered[ordered.length - Math.min(k, ordered.length)];
  }

  function validOf(row) {
    return row.filter((score) => score !== -Infinity);
  }

  // Which pairs survive: 1 or 0 each. Ties at the threshold all do; each query keeps its `minKeep` best keys.
  function survivors(scores, queries, keys, rule, sparsity, minKeep) {
    const keep = new Uint8Array(scores.length);
    const whole = rule === "percentile" ? validOf(scores) : null;
    const threshold = whole === null ? 0 : kthLargest(whole, keepCount(whole.length, sparsity));
    for (let query = 0; query < queries; query++) {
      const row = scores.subarray(query * keys, (query + 1) * keys);
      const valid = validOf(row);
      if (valid.length === 0) continue;
      const tau = whole === null
        ? kthLargest(valid, Math.max(keepCount(valid.length, sparsity), Math.min(minKeep, valid.length)))
        : Math.min(threshold, kthLargest(valid, minKeep));
      for (let key = 0; key < keys; key++) {
        if (row[key] !== -Infinity && row[key] >= tau) keep[query * keys + key] = 1;
      }
    }
    return keep;
  }

  // Softmax over the survivors of each query; without `keep` over its valid keys.
  function weights(scores, queries, keys, keep) {
    const result = new Float32Array(scores.length);
    for (let query = 0; query < queries; query++) {
      const start = query * keys;
      let highest = -Infinity;
      for (let place = start; place < start + keys; place++) {
        if ((keep === null || keep[place]) && scores[place] > highest) highest = scores[place];
      }
      if (highest === -Infinity) continue;
      let total = 0;
      for (let place = start; place < start + keys; place++) {
        if (scores[place] !== -Infinity && (keep === null || keep[place])) {
          result[place] = Math.exp(scores[place] - highest);
          total += result[place];
        }
      }
      for (let place = start; place < start + keys; place++) result[place] /= total;
    }
    return result;
  }

  // [removed, valid] pairs of one head.
  function count(scores, keep) {
    let valid = 0, kept = 0;
    for (let place = 0; place < scores.length; place++) {
      if (scores[place] === -Infinity) continue;
      valid += 1;
      kept += keep[place];
    }
    return [valid - kept, valid];
  }

  function bytes(text) {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => {
      const hex = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    };
    return { stops: ["--heat-low", "--heat-middle", "--heat-high"].map(read), removed: read("--removed") };
  }

  // The colour of a weight in [0, 1]; the square root gives small weights room.
  function shade(palette, weight) {
    const place = 2 * Math.sqrt(Math.min(1, Math.max(0, weight)));
    const from = palette.stops[place < 1 ? 0 : 1], to = palette.stops[place < 1 ? 1 : 2];
    const share = place < 1 ? place : place - 1;
    return from.map((value, channel) => Math.round(value + share * (to[channel] - value)));
  }

  // Relative luminance of a colour, as WCAG defines it.
  function luminance(colour) {
    const [red, green, blue] = colour.map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  // Draw a map on a canvas, `cell` pixels a pair. Removed pairs (keep = 0) are crossed out where there is room.
  function draw(canvas, values, queries, keys, cell, keep, palette) {
    canvas.width = keys * cell;
    canvas.height = queries * cell;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    const packed = ([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red;
    const cross = packed(palette.removed);
    for (let place = 0; place < queries * keys; place++) {
      const removed = keep !== null && !keep[place];
      const ink = packed(shade(palette, removed ? 0 : values[place]));
      const start = Math.floor(place / keys) * cell * canvas.width + (place % keys) * cell;
      for (let y = 0; y < cell; y++) {
        const line = start + y * canvas.width;
        pixels.fill(ink, line, line + cell);
        if (removed && cell >= 6) pixels[line + y] = pixels[line + cell - 1 - y] = cross;
      }
    }
    context.putImageData(image, 0, 0);
  }

  return { keepCount, survivors, weights, count, bytes, colours, shade, luminance, draw };
})();

// The reader's choice of a ground, and light paper whatever it is.
const ground = (() => {
  const root = document.documentElement;
  const redraw = [];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const changed = () => redraw.forEach((draw) => draw());
  let before = null;
  dark.addEventListener("change", changed);
  addEventListener("beforeprint", () => { before = root.dataset.theme ?? ""; root.dataset.theme = "light"; changed(); });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    changed();
  });
  document.querySelectorAll("[data-toggle=theme]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => {
      const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
      root.dataset.theme = isDark ? "light" : "dark";
      changed();
    });
  });
  return { onChange: (draw) => redraw.push(draw) };
})();
