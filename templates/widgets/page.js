// The page reads without any of this: scripts add selecting, sorting, filtering, figures and downloads. Each widget is one
// constant, named after its file; the files are joined in one function in the order that the page's Python names.
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const root = document.documentElement;
const narrow = matchMedia("(max-width: 900px)");

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// What Python packed: text or bytes, deflated, in base64.
async function unpack(id) {
  const text = atob($(`#${id}`).textContent), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);             // many times faster than Uint8Array.from
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate")));
}

// Numbers of which the first bytes of all stand first, then the second ones, and so on.
function join(bytes) {
  const count = bytes.byteLength / 4, planes = new Uint8Array(bytes), whole = new Uint8Array(bytes.byteLength);
  for (let byte = 0; byte < 4; byte++) for (let i = 0; i < count; i++) whole[4 * i + byte] = planes[byte * count + i];
  return new Float32Array(whole.buffer);
}

const words = {
  percent(share) {
    const value = 100 * share;
    if (value === 0) return "0\u00a0%";
    if (value < 1e-4) return "less than 0.0001\u00a0%";
    return `${value.toFixed(Math.max(0, 1 - Math.floor(Math.log10(value))))}\u00a0%`;
  },
  short(value) {
    for (const [limit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (value >= limit) return value < 1e12 ? +(value / limit).toPrecision(3) + suffix : value.toExponential(0);
    return String(+value.toPrecision(3));
  },
  number(value) {
    if (value === null || Number.isNaN(value)) return "n/a";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    return (size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : value.toPrecision(4)).replaceAll("-", "−");
  },
  // Bytes in three digits, in units of a thousand, as in Python.
  size(bytes) {
    const value = +bytes.toPrecision(3);
    for (const [limit, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (value >= limit) return `${+(value / limit).toPrecision(10)} ${unit}`;
    return words.count(bytes, "byte");
  },
  decibels: (value) => value === null ? "n/a" : `${value.toFixed(1)} dB`,
  // control characters and changes of direction spelled out, as in Python: a layer's name must not turn the text around it
  visible: (text) => text.replace(/(?! )[\p{C}\p{Z}]/gu, (c) => ({"\n": "\\n", "\r": "\\r", "\t": "\\t"})[c] ?? (c.codePointAt(0) < 256 ? "\\x" + c.codePointAt(0).toString(16).padStart(2, "0") : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"))),
  unbroken: (text) => text.replaceAll(" %", "\u00a0%"),
  count: (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`,
};
