// The attention maps of examples on which the arms disagree: choose an example and a layer.
(() => {
  const data = JSON.parse(document.getElementById("maps-data").textContent);
  const example = document.getElementById("maps-example"), layer = document.getElementById("maps-layer");
  const text = document.getElementById("maps-text"), read = document.getElementById("maps-read");
  const maps = [...document.querySelectorAll("#maps .map")];
  const decoded = new Map();

  function valuesOf(item, arm) {
    const key = `${example.value} ${arm}`;
    if (!decoded.has(key)) decoded.set(key, attention.bytes(item.maps[arm]));
    return decoded.get(key);
  }

  function labels(place, tokens, cell, side) {
    place.replaceChildren(...tokens.map((token) => {
      const label = document.createElement("span");
      label.textContent = token;
      label.style[side] = `${cell}px`;
      return label;
    }));
  }

  function show() {
    const item = data.examples[Number(example.value)];
    const size = item.tokens.length, cell = size > 48 ? 8 : 13;
    text.textContent = item.text;
    const palette = attention.colours();
    maps.forEach((map, arm) => {
      const start = Number(layer.value) * size * size;
      const values = Float32Array.from(valuesOf(item, arm).subarray(start, start + size * size), (byte) => byte / 255);
      labels(map.querySelector(".keys"), item.tokens, cell, "width");
      labels(map.querySelector(".queries"), item.tokens, cell, "height");
      const canvas = map.querySelector("canvas");
      attention.draw(canvas, values, size, size, cell, null, palette);
      canvas.onmousemove = (event) => {
        const key = Math.floor(event.offsetX / cell), query = Math.floor(event.offsetY / cell);
        if (!(query < size && key < size)) return;
        const weights = data.arms.map((name, other) => {
          const byte = valuesOf(item, other)[start + query * size + key];
          return `${name} ${(byte / 255).toFixed(2)}`;
        });
        read.textContent = `${item.tokens[query]} → ${item.tokens[key]}: ${weights.join(", ")}`;
      };
    });
  }

  layer.replaceChildren(...Array.from({ length: data.layers }, (_, number) => {
    const option = document.createElement("option");
    option.value = number;
    option.textContent = `${number + 1} of ${data.layers}`;
    return option;
  }));
  layer.value = String(data.layers - 1);
  example.addEventListener("change", show);
  layer.addEventListener("change", show);
  ground.onChange(show);
  show();
})();
