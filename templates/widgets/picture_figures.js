// What qvis/images/figures.py and png.py count, in the page's worker.
const measuring = (() => {
  const WINDOW = 11, SIGMA = 1.5, K1 = .01, K2 = .03, BINS = 256;
  const weights = Float64Array.from({length: WINDOW}, (_, i) => Math.exp(-((i - 5) ** 2) / (2 * SIGMA * SIGMA)));
  const sum = weights.reduce((a, b) => a + b);
  for (let i = 0; i < WINDOW; i++) weights[i] /= sum;

  function psnr(original, changed, depth) {
    let error = 0;
    for (let i = 0; i < changed.length; i++) { const off = original[i] - changed[i]; error += off * off; }
    const top = 2 ** depth - 1;
    return error ? 10 * Math.log10(top * top * changed.length / error) : Infinity;
  }

  // Weighted means of one row of numbers, and then of columns: a window of rows goes down the picture.
  function blur(width, height, value, use) {
    const across = width - WINDOW + 1, line = new Float64Array(width), rows = Array.from({length: WINDOW}, () => new Float64Array(across)), out = new Float64Array(across);
    for (let y = 0; y < height; y++) {
      const row = rows[y % WINDOW];
      for (let x = 0; x < width; x++) line[x] = value(y * width + x);
      for (let x = 0; x < across; x++) { let total = 0; for (let i = 0; i < WINDOW; i++) total += weights[i] * line[x + i]; row[x] = total; }
      if (y < WINDOW - 1) continue;
      const top = y - WINDOW + 1;
      out.fill(0);
      for (let i = 0; i < WINDOW; i++) { const from = rows[(top + i) % WINDOW], weight = weights[i]; for (let x = 0; x < across; x++) out[x] += weight * from[x]; }
      use(top, out);
    }
  }
  function blurred({width, height}, value) {
    const across = width - WINDOW + 1, found = new Float64Array(across * (height - WINDOW + 1));
    blur(width, height, value, (y, row) => found.set(row, y * across));
    return found;
  }

  // What SSIM needs of the original, once for all depths.
  function prepare(grey) {
    if (Math.min(grey.width, grey.height) < WINDOW) return null;
    const a = grey.samples, mean = blurred(grey, (i) => a[i]), square = blurred(grey, (i) => a[i] * a[i]);
    return {mean, variance: square.map((value, i) => value - mean[i] * mean[i])};
  }
  function ssim(grey, known, changed) {
    if (!known) return NaN;
    const a = grey.samples, b = changed.samples, top = 2 ** grey.depth - 1, c1 = (K1 * top) ** 2, c2 = (K2 * top) ** 2;
    const mean = blurred(grey, (i) => b[i]), square = blurred(grey, (i) => b[i] * b[i]), product = blurred(grey, (i) => a[i] * b[i]);
    let total = 0;
    for (let i = 0; i < mean.length; i++) {
      const both = known.mean[i] * mean[i], covariance = product[i] - both, variance = square[i] - mean[i] * mean[i];
      total += (2 * both + c1) * (2 * covariance + c2) / ((known.mean[i] * known.mean[i] + mean[i] * mean[i] + c1) * (known.variance[i] + variance + c2));
    }
    return total / mean.length;
  }

  const key = (samples, at, channels) => channels === 1 ? samples[at] : (samples[at] * 65536 + samples[at + 1]) * 65536 + samples[at + 2];
  function coloursOf({samples, channels, depth}) {
    const found = new Set();
    if (depth === 8 && channels === 3) {                               // a bit for each colour is quicker than a set of all
      const bits = new Uint32Array(2 ** 19);
      for (let at = 0; at < samples.length; at += 3) { const one = samples[at] << 16 | samples[at + 1] << 8 | samples[at + 2]; bits[one >> 5] |= 1 << (one & 31); }
      let count = 0;
      for (let word = 0; word < bits.length; word++) for (let left = bits[word]; left; left &= left - 1) { count++; if (count <= 256) { const one = word * 32 + 31 - Math.clz32(left & -left); found.add(((one >> 16) * 65536 + (one >> 8 & 255)) * 65536 + (one & 255)); } }
      return {count, few: count <= 256 ? [...found].sort((a, b) => a - b) : null};
    }
    for (let at = 0; at < samples.length; at += channels) found.add(key(samples, at, channels));
    return {count: found.size, few: found.size <= 256 ? [...found].sort((a, b) => a - b) : null};
  }

  // ------------------------------------------------------------------------------------------ PNG
  function paeth({samples, width, height, channels, depth}) {
    const wide = depth / 8, step = channels * wide, line = width * step, rows = new Uint8Array(height * (line + 1));
    const bytes = new Uint8Array(height * line);
    if (depth === 8) bytes.set(samples);
    else for (let i = 0; i < samples.length; i++) { bytes[2 * i] = samples[i] >> 8; bytes[2 * i + 1] = samples[i] & 255; }
    for (let y = 0, at = 0, to = 0; y < height; y++) {
      rows[to++] = 4;
      for (let x = 0; x < line; x++, at++) {
        const left = x < step ? 0 : bytes[at - step], above = y ? bytes[at - line] : 0, corner = x < step || !y ? 0 : bytes[at - line - step];
        const byLeft = Math.abs(above - corner), byAbove = Math.abs(left - corner), byCorner = Math.abs(left + above - 2 * corner);
        rows[to++] = bytes[at] - (byLeft <= byAbove && byLeft <= byCorner ? left : byAbove <= byCorner ? above : corner);
      }
    }
    return rows;
  }
  function indexed({samples, width, height, channels}, few, bits) {
    const place = new Map(few.map((one, i) => [one, i])), line = Math.ceil(width * bits / 8), rows = new Uint8Array(height * (line + 1));
    for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += channels) {
      rows[y * (line + 1) + 1 + (x * bits >> 3)] |= place.get(key(samples, at, channels)) << 8 - bits - (x * bits & 7);
    }
    return rows;
  }
  async function pngBytes(picture, few) {
    const use = picture.depth === 8 && few, bits = use ? [1, 2, 4, 8].find((one) => few.length <= 2 ** one) : 0;
    const rows = use ? indexed(picture, few, bits) : paeth(picture);
    const packed = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
    return 8 + 25 + 12 + 12 + packed.byteLength + (use ? 12 + 3 * few.length : 0);
  }

  function histogram({samples, channels, depth}) {
    const found = Array.from({length: channels}, () => new Array(BINS).fill(0)), shift = depth - 8;
    for (let at = 0; at < samples.length; at += channels) for (let c = 0; c < channels; c++) found[c][samples[at + c] >> shift]++;
    return found;
  }

  // All figures of a quantized picture, or of the original where it is compared with itself.
  async function measure(original, grey, known, changed) {
    const {count, few} = coloursOf(changed), png = await pngBytes(changed, few);
    const against = changed.channels === 1 ? grey : original;
    return {
      colours: count, png_bytes: png, ratio: original.samples.byteLength / png,
      psnr: psnr(against.samples, changed.samples, original.depth), ssim: ssim(grey, known, quantizing.luminance(changed)),
    };
  }
  return {measure, prepare, histogram};
})();
