// The pictures, what is shown of them, and the worker that computes: the page itself only draws.
const store = await (async () => {
  const payload = await unpack("payload").then((response) => response.json());
  const code = await unpack("worker").then((response) => response.text());
  const waiting = new Map(), pixels = unpack("pixels").then((response) => response.arrayBuffer());
  let worker, last = 0;

  function receive({id, error, ...found}) {
    const {done, fail} = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) done(found); else fail(new Error(error));
  }
  // Where a browser grants no worker, as in some frames, the page computes by itself: slower to answer, but the same.
  function alone() {
    worker = null;
    if (!globalThis.answerPicture) document.body.append(element("script", code));
    for (const {request} of waiting.values()) globalThis.answerPicture(request).then(receive);
  }
  try {
    worker = new Worker(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
    worker.onmessage = (event) => receive(event.data);
    worker.onerror = (event) => { event.preventDefault(); alone(); };
  } catch { alone(); }

  function ask(what, details) {
    const request = {id: ++last, do: what, ...details};
    return new Promise((done, fail) => {
      waiting.set(request.id, {request, done, fail});
      if (worker) worker.postMessage(request); else globalThis.answerPicture(request).then(receive);
    });
  }

  function draw(rgba, {width, height}, canvas = document.createElement("canvas")) {
    canvas.width = width; canvas.height = height;
    canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
    return canvas;
  }

  // Where the samples of each picture begin among those of all.
  let start = 0;
  const pictures = payload.pictures.map((picture) => { const one = {...picture, start, at: new Map()}; start += picture.width * picture.height * picture.channels * picture.depth / 8; return one; });

  // Brings a picture's pixels to the worker, once.
  function load(index) {
    const one = pictures[index];
    one.loading ??= pixels.then(async (all) => {
      const {width, height, channels, depth, tile} = one, bytes = new Uint8Array(all.slice(one.start, one.start + width * height * channels * depth / 8));
      take(one, await ask("load", {index, picture: {bytes, width, height, channels, depth, tile}}));
    });
    return one.loading;
  }
  function take(one, {rgba, counts}) { one.canvas = draw(rgba, one); one.counts = counts; }

  // A picture from a file, as the last one.
  async function open(file) {
    const index = pictures.push(null) - 1;
    try {
      const {rgba, counts, ...head} = await ask("open", {index, file, longest: payload.longest, tile: [payload.tile, payload.tile]});
      pictures[index] = {name: words.visible(file.name), kind: "picture", ...head, at: new Map(), loading: Promise.resolve()};
      take(pictures[index], {rgba, counts});
      return index;
    } catch (error) { if (pictures.length === index + 1) pictures.pop(); throw error; }
  }

  const state = {index: 0, bits: 4, side: "quantized", settings: {...payload.settings}};
  // What the settings come to for a picture: some say nothing about a grey one, or about a palette.
  function settings(one = pictures[state.index]) {
    const {channels, levels, rounding, range} = state.settings;
    return {channels: one.channels === 1 ? "rgb" : channels, levels, rounding, range: levels === "palette" || range === "channel" && one.channels === 1 ? "picture" : range};
  }
  const depths = (one = pictures[state.index]) => payload.bits.filter((bits) => bits <= (state.settings.levels === "palette" ? 8 : one.depth));

  // Figures that Python measured: of each original, and of the depths with the settings that the page opens with.
  const plain = {channels: "rgb", levels: "uniform", rounding: "nearest", range: "picture"};
  for (const one of pictures) {
    const [original, ...found] = one.found.map((figures) => ({psnr: Infinity, ssim: NaN, ...figures}));
    one.original = {...original, levels: 2 ** one.depth, bytes: one.width * one.height * one.channels * one.depth / 8, bits_per_pixel: one.channels * one.depth};
    one.known = {key: JSON.stringify(one.kind === "layer" ? plain : settings(one)), at: new Map(found.map((figures) => [figures.bits, figures]))};
  }

  return {payload, pictures, state, settings, depths, ask, load, open, draw, get shown() { return pictures[state.index]; }};
})();
