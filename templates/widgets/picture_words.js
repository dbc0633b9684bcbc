// Figures in words, as qvis/images/page.py has them.
const figure = (() => {
  const decibels = (value) => value === Infinity ? "∞ dB" : `${value.toFixed(1).replace("-", "−")} dB`;
  const count = (value) => value.toLocaleString("en");
  const say = {
    levels: count, colours: count, bits_per_pixel: String, bytes: words.size, png_bytes: words.size, psnr: decibels,
    ratio: (value) => value < 100 ? value.toFixed(1) : count(Math.round(value)),
    ssim: (value) => Number.isNaN(value) ? "n/a" : value.toFixed(4),
  };
  const titles = {levels: "Levels", colours: "Colours used", bits_per_pixel: "Bits per pixel", bytes: "Packed", png_bytes: "PNG", ratio: "Times smaller", psnr: "PSNR", ssim: "SSIM"};
  const bits = (number) => number === "original" ? number : words.count(number, "bit");
  const cell = (found, name) => found?.[name] === undefined ? "…" : say[name](found[name]);
  return {cell, titles, bits, decibels};
})();
