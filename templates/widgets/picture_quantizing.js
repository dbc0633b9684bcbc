// What qvis/images/quantizing.py does, pixel for pixel: whole numbers and doubles, each operation in the same order, halves
// to even. It runs in the page's worker. A picture is {width, height, channels, depth, samples, tile}, with the samples of
// each pixel side by side, 8 or 16 bits each.
const quantizing = (() => {
  const SCALE_BITS = 16, ROUNDS = 12, CELL_BITS = {1: 12, 3: 5};

  function rint(value) {
    const down = Math.floor(value), part = value - down;
    return part > .5 || (part === .5 && down % 2 !== 0) ? down + 1 : down;
  }
  const clip = (value, low, high) => value < low ? low : value > high ? high : value;
  const like = (picture, length) => picture.depth === 8 ? new Uint8Array(length) : new Uint16Array(length);

  function luminance(picture) {
    if (picture.channels === 1) return picture;
    const {samples, width, height} = picture, grey = like(picture, width * height);
    for (let i = 0, at = 0; i < grey.length; i++, at += 3) grey[i] = Math.floor((299 * samples[at] + 587 * samples[at + 1] + 114 * samples[at + 2] + 500) / 1000);
    return {...picture, channels: 1, samples: grey};
  }

  // ------------------------------------------------------------------------------------------ even steps
  // The lowest number and the step of each block. block() tells which one a number is in: of each channel, row and column.
  function fit({width, height, channels, samples, tile}, bits, range) {
    const steps = 2 ** bits - 1, [across, down] = range === "tile" ? tile : [width, height];
    const columns = Math.ceil(width / across), rows = Math.ceil(height / down), each = range === "picture" ? 0 : rows * columns, count = each ? each * channels : 1;
    const low = new Float64Array(count).fill(Infinity), high = new Float64Array(count).fill(-Infinity), step = new Float64Array(count);
    const block = (x, y, c) => each && c * each + Math.floor(y / down) * columns + Math.floor(x / across);
    for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++) for (let c = 0, b = block(x, y, 0); c < channels; c++, at++, b += each) {
      const value = samples[at];
      if (value < low[b]) low[b] = value;
      if (value > high[b]) high[b] = value;
    }
    for (let b = 0; b < count; b++) step[b] = (high[b] - low[b]) / steps || 1;
    return {low, step, steps, block, each, count};
  }

  // The level next to a value, in whole numbers.
  const level = (value, low, step, steps) => rint(clip(rint((value - low) / step), 0, steps) * step + low);

  function onGrid(picture, bits, {range, rounding}) {
    const {width, height, channels, depth, samples} = picture, {low, step, steps, block, each, count} = fit(picture, bits, range);
    let found = like(picture, samples.length);
    if (rounding === "dithered") {
      found = dither(picture, (wanted, x, y, out) => {
        for (let c = 0, b = block(x, y, 0); c < channels; c++, b += each) out[c] = level(wanted[c], low[b], step[b], steps);
      });
    } else if (count <= channels) {                                    // a few blocks: each number's level is found once
      const size = 2 ** depth, tables = Array.from({length: count}, (_, b) => Float64Array.from({length: size}, (_, value) => level(value, low[b], step[b], steps)));
      for (let c = 0; c < channels; c++) { const table = tables[count > 1 ? c : 0]; for (let at = c; at < samples.length; at += channels) found[at] = table[samples[at]]; }
    } else {
      for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++) for (let c = 0, b = block(x, y, 0); c < channels; c++, at++, b += each) found[at] = level(samples[at], low[b], step[b], steps);
    }
    const values = new Set();
    for (let code = 0; code <= steps && bits <= 8; code++) values.add(rint(code * step[0] + low[0]));
    return {samples: found, bytes: Math.ceil((samples.length * bits + count * 2 * SCALE_BITS) / 8), bitsPerPixel: bits * channels, values: [...values]};
  }

  // ------------------------------------------------------------------------------------------ palettes
  // Up to `most` colours, in order, or nothing where there are more.
  function distinct({samples, channels}, most) {
    const seen = new Set();
    for (let at = 0; at < samples.length; at += channels) {
      seen.add(channels === 1 ? samples[at] : (samples[at] * 65536 + samples[at + 1]) * 65536 + samples[at + 2]);
      if (seen.size > most) return null;
    }
    const ordered = Float64Array.from(seen).sort();
    if (channels === 1) return ordered;
    return Float64Array.from([...ordered].flatMap((key) => [Math.floor(key / 2 ** 32), Math.floor(key / 65536) % 65536, key % 65536]));
  }

  function cells({samples, channels, depth}) {
    const width = Math.min(CELL_BITS[channels], depth), size = 2 ** (width * channels), shift = depth - width;
    const counts = new Float64Array(size), sums = new Float64Array(size * channels), squares = new Float64Array(size * channels);
    for (let at = 0; at < samples.length; at += channels) {
      let cell = 0;
      for (let c = 0; c < channels; c++) cell = cell << width | samples[at + c] >> shift;
      counts[cell]++;
      for (let c = 0; c < channels; c++) { const value = samples[at + c]; sums[cell * channels + c] += value; squares[cell * channels + c] += value * value; }
    }
    const found = [];
    for (let cell = 0; cell < size; cell++) {
      if (!counts[cell]) continue;
      const places = [];
      for (let c = 0; c < channels; c++) places.push(cell >> width * (channels - 1 - c) & 2 ** width - 1);
      found.push({places, count: counts[cell], sums: [...sums.subarray(cell * channels, (cell + 1) * channels)], squares: [...squares.subarray(cell * channels, (cell + 1) * channels)]});
    }
    return found;
  }

  // The squared error of a box in each channel, when its mean stands for it; 0 where it cannot be cut.
  function spread(box, channels) {
    const found = [];
    for (let c = 0; c < channels; c++) {
      let n = 0, total = 0, square = 0, low = Infinity, high = -Infinity;
      for (const cell of box) { n += cell.count; total += cell.sums[c]; square += cell.squares[c]; low = Math.min(low, cell.places[c]); high = Math.max(high, cell.places[c]); }
      found.push(low < high ? square - total * total / n : 0);
    }
    return found;
  }
  const largest = (values) => { let at = 0; for (let i = 1; i < values.length; i++) if (values[i] > values[at]) at = i; return at; };

  function cut(all, channels, count) {
    const boxes = [all], spreads = [spread(all, channels)];
    while (boxes.length < count) {
      const chosen = largest(spreads.map((one) => Math.max(...one)));
      if (Math.max(...spreads[chosen]) <= 0) break;
      const axis = largest(spreads[chosen]), box = boxes[chosen];
      let low = Infinity, high = -Infinity, wholeN = 0, whole = 0;
      for (const cell of box) { low = Math.min(low, cell.places[axis]); high = Math.max(high, cell.places[axis]); wholeN += cell.count; whole += cell.sums[axis]; }
      const counts = new Float64Array(high - low + 1), sums = new Float64Array(high - low + 1), gains = [];
      for (const cell of box) { counts[cell.places[axis] - low] += cell.count; sums[cell.places[axis] - low] += cell.sums[axis]; }
      let n = 0, total = 0;
      for (let i = 0; i < high - low; i++) {
        n += counts[i]; total += sums[i];
        const restN = wholeN - n, rest = whole - total;
        gains.push(total * total / n + rest * rest / restN);
      }
      const border = low + largest(gains);
      boxes.push(box.filter((cell) => cell.places[axis] > border));
      boxes[chosen] = box.filter((cell) => cell.places[axis] <= border);
      spreads.push(spread(boxes.at(-1), channels));
      spreads[chosen] = spread(boxes[chosen], channels);
    }
    const palette = new Float64Array(boxes.length * channels);
    boxes.forEach((box, i) => mean(box, channels, palette, i));
    return palette;
  }

  function mean(box, channels, palette, place) {
    let n = 0;
    for (const cell of box) n += cell.count;
    for (let c = 0; c < channels && n; c++) {
      let total = 0;
      for (const cell of box) total += cell.sums[c];
      palette[place * channels + c] = rint(total / n);
    }
  }

  // Where in the palette the colour nearest to (r, g, b) begins, or to the grey r; of two, the first.
  function nearest(palette, channels, r, g, b) {
    let best = Infinity, found = 0;
    if (channels === 1) {
      for (let at = 0; at < palette.length; at++) { const d = r - palette[at], far = d * d; if (far < best) { best = far; found = at; } }
      return found;
    }
    for (let at = 0; at < palette.length; at += 3) {
      const dr = r - palette[at], dg = g - palette[at + 1], db = b - palette[at + 2], far = dr * dr + dg * dg + db * db;
      if (far < best) { best = far; found = at; }
    }
    return found;
  }

  function learn(picture, count) {
    const {channels} = picture, few = distinct(picture, count);
    if (few) return few;
    const all = cells(picture);
    let palette = cut(all, channels, count);
    const means = all.map((cell) => cell.sums.map((sum) => rint(sum / cell.count)));
    for (let round = 0; round < ROUNDS; round++) {
      const groups = Array.from({length: palette.length / channels}, () => []), moved = palette.slice();
      all.forEach((cell, i) => groups[nearest(palette, channels, ...means[i]) / channels].push(cell));
      groups.forEach((group, i) => mean(group, channels, moved, i));
      if (moved.every((value, i) => value === palette[i])) break;
      palette = moved;
    }
    return distinct({samples: palette, channels}, count);
  }

  function withPalette(picture, bits, {rounding}) {
    const {samples, channels, width, height, depth} = picture, palette = learn(picture, 2 ** bits);
    let found;
    if (rounding === "dithered") {
      found = dither(picture, (wanted, x, y, out) => {
        const at = nearest(palette, channels, wanted[0], wanted[1], wanted[2]);
        for (let c = 0; c < channels; c++) out[c] = palette[at + c];
      });
    } else {
      found = like(picture, samples.length);
      const known = new Map();
      let last = -1, place = 0;
      for (let at = 0; at < samples.length; at += channels) {
        const r = samples[at], g = samples[at + 1], b = samples[at + 2], key = channels === 1 ? r : (r * 65536 + g) * 65536 + b;
        if (key !== last) {
          last = key; place = known.get(key);
          if (place === undefined) known.set(key, place = nearest(palette, channels, r, g, b));
        }
        for (let c = 0; c < channels; c++) found[at + c] = palette[place + c];
      }
    }
    const greys = luminance({...picture, width: palette.length / channels, height: 1, samples: palette}).samples;
    return {samples: found, bytes: Math.ceil((width * height * bits + palette.length * depth) / 8), bitsPerPixel: bits, values: [...new Set(greys)].sort((a, b) => a - b)};
  }

  // ------------------------------------------------------------------------------------------ dithering
  // Error diffusion by Floyd and Steinberg, rows from left to right; round(wanted, x, y, out) rounds a pixel.
  function dither(picture, round) {
    const {samples, width, height, channels, depth} = picture, top = 2 ** depth - 1, line = (width + 2) * channels;
    const found = like(picture, samples.length), wanted = new Float64Array(channels), out = new Float64Array(channels);
    let above = new Float64Array(line), here = new Float64Array(line);      // errors, with a pixel more at each side
    for (let y = 0, at = 0; y < height; y++) {
      here.fill(0);
      for (let x = 0; x < width; x++, at += channels) {
        const left = x * channels, middle = left + channels, right = middle + channels;
        for (let c = 0; c < channels; c++) {
          const handed = 7 * here[left + c] + 3 * above[right + c] + 5 * above[middle + c] + above[left + c];
          wanted[c] = clip(samples[at + c] + handed / 16, 0, top);
        }
        round(wanted, x, y, out);
        for (let c = 0; c < channels; c++) { found[at + c] = out[c]; here[middle + c] = wanted[c] - out[c]; }
      }
      [above, here] = [here, above];
    }
    return found;
  }

  function quantize(picture, bits, settings) {
    const seen = settings.channels === "luminance" ? luminance(picture) : picture;
    return settings.levels === "palette" ? withPalette(seen, bits, settings) : onGrid(seen, bits, settings);
  }
  return {quantize, luminance, rint};
})();
