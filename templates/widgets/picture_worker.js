// Answers the page, one request at a time: {id, do, ...} in, {id, ...} or {id, error} out. It keeps the pictures, and of the one
// that is shown its quantized pixels, until other settings are asked for.
const pictures = new Map();
let kept = {of: "", at: new Map()};

// Undoes Paeth's filter: bytes of rows without the number of the filter, the high byte of 16 bits first.
function unfilter({bytes, width, height, channels, depth, ...rest}) {
  const step = channels * depth / 8, line = width * step;
  for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < line; x++, at++) {
    const left = x < step ? 0 : bytes[at - step], above = y ? bytes[at - line] : 0, corner = x < step || !y ? 0 : bytes[at - line - step];
    const byLeft = Math.abs(above - corner), byAbove = Math.abs(left - corner), byCorner = Math.abs(left + above - 2 * corner);
    bytes[at] += byLeft <= byAbove && byLeft <= byCorner ? left : byAbove <= byCorner ? above : corner;
  }
  const samples = depth === 8 ? bytes : Uint16Array.from({length: bytes.length / 2}, (_, i) => bytes[2 * i] << 8 | bytes[2 * i + 1]);
  return {width, height, channels, depth, samples, ...rest};
}

// What a canvas shows.
function colours({samples, channels, depth, width, height}) {
  const out = new Uint8ClampedArray(4 * width * height), scale = depth === 8 ? 1 : 257;
  for (let i = 0, at = 0; i < out.length; i += 4, at += channels) {
    for (let c = 0; c < 3; c++) out[i + c] = samples[at + (channels === 1 ? 0 : c)] / scale;
    out[i + 3] = 255;
  }
  return out;
}

function keep(index, picture) {
  const grey = quantizing.luminance(picture);
  pictures.set(index, {picture, grey, known: null});
  const {samples, ...head} = picture;
  return {...head, rgba: colours(picture), counts: measuring.histogram(picture)};
}

// The quantized picture, from before if it was asked for already.
function quantized({index, bits, settings}) {
  const of = `${index} ${JSON.stringify(settings)}`;
  if (kept.of !== of) kept = {of, at: new Map()};
  if (!kept.at.has(bits)) {
    const {picture} = pictures.get(index), found = quantizing.quantize(picture, bits, settings);
    kept.at.set(bits, {...found, picture: {...picture, channels: settings.channels === "luminance" ? 1 : picture.channels, samples: found.samples}});
  }
  return kept.at.get(bits);
}

const against = (index, other) => other.channels === 1 ? pictures.get(index).grey : pictures.get(index).picture;

const answers = {
  load: ({index, picture}) => keep(index, unfilter(picture)),
  async open({index, file, longest, tile}) {
    const {picture, given, notes} = await opening.open(file, longest);
    return {...keep(index, {...picture, tile}), given, notes};
  },
  quantize(request) {
    const {picture, bytes, bitsPerPixel, values} = quantized(request);
    return {rgba: colours(picture), bytes, bits_per_pixel: bitsPerPixel, values, counts: measuring.histogram(picture)};
  },
  async measure(request) {
    const one = pictures.get(request.index);
    one.known ??= measuring.prepare(one.grey);
    return measuring.measure(one.picture, one.grey, one.known, quantized(request).picture);
  },
  async original({index}) {
    const one = pictures.get(index), {picture} = one;
    one.known ??= measuring.prepare(one.grey);
    const found = await measuring.measure(picture, one.grey, one.known, picture);
    return {...found, bytes: picture.samples.byteLength, bits_per_pixel: picture.depth * picture.channels};
  },
  // How far each number is off, the furthest as bright as can be.
  error(request) {
    const {picture} = quantized(request), from = against(request.index, picture), off = picture.samples.map((value, i) => Math.abs(value - from.samples[i]));
    let most = 0;
    for (const value of off) if (value > most) most = value;
    const top = 2 ** picture.depth - 1, samples = most ? off.map((value) => Math.round(value * top / most)) : off;
    return {rgba: colours({...picture, samples}), most, top};
  },
  async png(request) { const {picture} = quantized(request); return {blob: await measuring.png(picture)}; },
};

async function answer(request) {
  try { return {id: request.id, ...await answers[request.do](request)}; } catch (error) { return {id: request.id, error: error.message}; }
}
if (typeof document === "undefined") {
  self.onmessage = async ({data}) => { const found = await answer(data); postMessage(found, found.rgba ? [found.rgba.buffer] : []); };
} else globalThis.answerPicture = answer;
