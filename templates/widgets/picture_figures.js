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
  const zlib = async (bytes) => new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer());
  async function deflated(picture, few) {
    const bits = picture.depth === 8 && few ? [1, 2, 4, 8].find((one) => few.length <= 2 ** one) : 0;
    return {bits, data: await zlib(bits ? indexed(picture, few, bits) : paeth(picture))};
  }

  const CRC = Uint32Array.from({length: 256}, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ n >>> 1 : n >>> 1; return n; });
  function chunk(name, content) {
    const made = new Uint8Array(12 + content.length), view = new DataView(made.buffer);
    view.setUint32(0, content.length);
    made.set([...name].map((c) => c.charCodeAt(0)), 4); made.set(content, 8);
    let crc = -1;
    for (let i = 4; i < made.length - 4; i++) crc = CRC[(crc ^ made[i]) & 255] ^ crc >>> 8;
    view.setUint32(made.length - 4, ~crc);
    return made;
  }
  // The file that Python would write.
  async function png(picture) {
    const {few} = coloursOf(picture), {bits, data} = await deflated(picture, few), header = new Uint8Array(13), view = new DataView(header.buffer), parts = [];
    view.setUint32(0, picture.width); view.setUint32(4, picture.height);
    header.set([bits || picture.depth, bits ? 3 : picture.channels === 3 ? 2 : 0], 8);
    if (bits) parts.push(chunk("PLTE", Uint8Array.from(few.flatMap((one) => picture.channels === 1 ? [one, one, one] : [Math.floor(one / 2 ** 32), Math.floor(one / 65536) % 65536, one % 65536]))));
    const mark = Uint8Array.from([..."Software\0qvis"].map((c) => c.charCodeAt(0)));
    return new Blob([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), chunk("IHDR", header), chunk("tEXt", mark), ...parts, chunk("IDAT", data), chunk("IEND", new Uint8Array(0))], {type: "image/png"});
  }

  function histogram({samples, channels, depth}) {
    const found = Array.from({length: channels}, () => new Array(BINS).fill(0)), shift = depth - 8;
    for (let at = 0; at < samples.length; at += channels) for (let c = 0; c < channels; c++) found[c][samples[at + c] >> shift]++;
    return found;
  }

  // All figures of a quantized picture, or of the original where it is compared with itself.
  async function measure(original, grey, known, changed) {
    const {count} = coloursOf(changed), bytes = (await png(changed)).size;
    const against = changed.channels === 1 ? grey : original;
    return {
      colours: count, png_bytes: bytes, ratio: original.samples.byteLength / bytes,
      psnr: psnr(against.samples, changed.samples, original.depth), ssim: ssim(grey, known, quantizing.luminance(changed)),
    };
  }
  return {measure, prepare, histogram, png};
})();
