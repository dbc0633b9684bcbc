// From a file to pixels, in the page's worker. What a file is, and how large, is read from its own first bytes before anything
// decodes it: a drawing with scripts is not opened, and nothing unpacks to more than it may.
const opening = (() => {
  const MOST_PIXELS = 100_000_000, MOST_BYTES = 200_000_000;
  const fail = (text) => { throw new Error(text); };
  const text = (bytes, start, length) => String.fromCharCode(...bytes.subarray(start, start + length));

  // Each reader: {width, height, notes}, or it fails where the file ends too early.
  function png(bytes, view) {
    if (bytes.length < 33 || text(bytes, 12, 4) !== "IHDR") fail("is damaged or cut short: it has no header");
    const notes = [];
    if (bytes[24] === 16) notes.push("read with 8 of its 16 bits, as browsers do; qvis image reads all of them");
    let at = 8, end = false;
    while (at + 12 <= bytes.length && !end) {
      const name = text(bytes, at + 4, 4);
      if (name === "acTL") notes.push(`the first of ${view.getUint32(at + 8)} frames`);
      if (name === "iCCP") notes.push("taken as sRGB, whatever its colour profile says");
      end = name === "IEND";
      at += 12 + view.getUint32(at);
    }
    return {width: view.getUint32(16), height: view.getUint32(20), notes, whole: end};
  }

  function jpeg(bytes, view) {
    const notes = [];
    let at = 2, width = 0, height = 0;
    while (at + 4 <= bytes.length) {
      if (bytes[at] !== 0xff) { at++; continue; }
      const marker = bytes[at + 1];
      if (marker === 0xff) { at++; continue; }
      if (marker === 0xda) break;
      if (marker >= 0xd0 && marker <= 0xd9 || marker === 1 || marker === 0) { at += 2; continue; }
      const length = view.getUint16(at + 2);
      if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker) && at + 9 <= bytes.length) { height = view.getUint16(at + 5); width = view.getUint16(at + 7); }
      if (marker === 0xe1 && text(bytes, at + 4, 4) === "Exif" && turned(view, at + 10)) notes.push("turned as its EXIF data say");
      if (marker === 0xe2 && text(bytes, at + 4, 11) === "ICC_PROFILE" && !notes.some((note) => note.startsWith("taken"))) notes.push("taken as sRGB, whatever its colour profile says");
      at += 2 + length;
    }
    if (!width) fail("is damaged or cut short: it has no header");
    let whole = false;                                                 // the end of the image, behind the beginning of its data
    for (let i = bytes.length - 2; i > at && !whole; i--) whole = bytes[i] === 0xff && bytes[i + 1] === 0xd9;
    return {width, height, notes, whole};
  }
  function turned(view, start) {
    try {
      const little = view.getUint16(start) === 0x4949, first = start + view.getUint32(start + 4, little), count = view.getUint16(first, little);
      for (let i = 0; i < count; i++) if (view.getUint16(first + 2 + 12 * i, little) === 0x0112) return view.getUint16(first + 10 + 12 * i, little) > 1;
    } catch { /* damaged data about the picture do no harm to it */ }
    return false;
  }

  function gif(bytes, view) {
    if (bytes.length < 14) fail("is damaged or cut short: it has no header");
    const notes = text(bytes, 0, Math.min(bytes.length, 2048)).includes("NETSCAPE2.0") ? ["the first of its frames"] : [];
    return {width: view.getUint16(6, true), height: view.getUint16(8, true), notes, whole: true};
  }

  function webp(bytes, view) {
    if (bytes.length < 30) fail("is damaged or cut short: it has no header");
    const kind = text(bytes, 12, 4), whole = bytes.length >= 8 + view.getUint32(4, true), notes = [];
    const three = (at) => 1 + bytes[at] + (bytes[at + 1] << 8) + (bytes[at + 2] << 16);
    if (kind === "VP8X") {
      if (bytes[20] & 2) notes.push("the first of its frames");
      return {width: three(24), height: three(27), notes, whole};
    }
    if (kind === "VP8L") { const packed = view.getUint32(21, true); return {width: 1 + (packed & 0x3fff), height: 1 + (packed >> 14 & 0x3fff), notes, whole}; }
    return {width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff, notes, whole};
  }

  function look(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), start = text(bytes, 0, Math.min(12, bytes.length));
    if (!bytes.length) fail("is empty (0 bytes)");
    if (start.startsWith("\x89PNG\r\n\x1a\n")) return png(bytes, view);
    if (start.startsWith("\xff\xd8\xff")) return jpeg(bytes, view);
    if (start.startsWith("GIF8")) return gif(bytes, view);
    if (start.startsWith("RIFF") && start.endsWith("WEBP")) return webp(bytes, view);
    if (new TextDecoder().decode(bytes.subarray(0, 4096)).match(/<svg[\s>]/i)) fail("is an SVG: a drawing that has no pixels and may hold scripts, so that it is not opened; save it as a PNG first");
    return fail("is not a picture that can be opened; expected PNG, JPEG, WebP or GIF");
  }

  // A picture for quantizing.js, no side longer than `longest`.
  async function open(file, longest) {
    if (file.size > MOST_BYTES) fail(`has ${Math.round(file.size / 1e6)} MB; expected at most ${MOST_BYTES / 1e6}`);
    const {width, height, notes, whole} = look(new Uint8Array(await file.arrayBuffer()));
    if (!width || !height) fail(`says it has ${width} × ${height} pixels`);
    if (width * height > MOST_PIXELS) fail(`says it has ${width.toLocaleString("en")} × ${height.toLocaleString("en")} pixels, too many to be decoded; expected at most 100 million`);
    if (!whole) fail("is cut short: its end is missing; give another copy of it");
    let bitmap = await createImageBitmap(file, {colorSpaceConversion: "none"}).catch(() => fail("is damaged: the browser cannot decode it"));
    const given = [bitmap.width, bitmap.height], factor = Math.max(1, Math.max(...given) / longest);
    const [across, down] = given.map((side) => Math.max(1, Math.round(side / factor)));
    if (factor > 1) notes.push(`resized from ${given[0].toLocaleString("en")} × ${given[1].toLocaleString("en")} to ${across.toLocaleString("en")} × ${down.toLocaleString("en")} for the page`);
    const canvas = typeof OffscreenCanvas === "undefined" ? Object.assign(document.createElement("canvas"), {width: across, height: down}) : new OffscreenCanvas(across, down);
    const context = canvas.getContext("2d", {willReadFrequently: true, colorSpace: "srgb"});
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, across, down);
    bitmap.close();
    const {data} = context.getImageData(0, 0, across, down);
    return {picture: pixels(data, across, down, notes), given, notes};
  }

  // Red, green and blue, or one grey where they are the same everywhere; on white where there is transparency.
  function pixels(data, width, height, notes) {
    const count = width * height;
    let clear = false, grey = true;
    for (let at = 0; at < data.length; at += 4) {
      const alpha = data[at + 3];
      if (alpha < 255) { clear = true; for (let c = 0; c < 3; c++) data[at + c] = Math.floor((data[at + c] * alpha + 255 * (255 - alpha) + 127) / 255); }
      grey &&= data[at] === data[at + 1] && data[at] === data[at + 2];
    }
    if (clear) notes.push("laid on white where it is transparent");
    const channels = grey ? 1 : 3, samples = new Uint8Array(count * channels);
    for (let i = 0; i < count; i++) for (let c = 0; c < channels; c++) samples[i * channels + c] = data[4 * i + c];
    return {width, height, channels, depth: 8, samples};
  }
  return {open};
})();
