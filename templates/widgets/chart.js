// Charts of few points, in SVG: sharp at any size and on paper, and coloured by the page's style sheet.
//
//   chart(host, {x: {label, log, ticks, low, high, format}, y: {...}, height, label, onpick, series: [
//     {name, kind, points: [[x, y, text, pick], ...], colour, style}, ...]})
//
// `kind` is line, step, dots, bars, stems (from the axis up to y), rules (vertical, at x) or rows (horizontal, at y);
// `style` is solid, dashed or dotted of a line, open of a dot; `colour` a custom property of page.css without the dashes.
// A bar is [left, height, text, pick, right]. `text` is what the pointer shows, `pick` what onpick is called with. Series
// with a name are listed below the chart; series with `mark` carry this text at their last point. `ticks` are where
// lines are drawn, `low` and `high` the ends of an axis, all found from the points where they are left out.
const chart = (() => {
  const SPACE = "http://www.w3.org/2000/svg", LEFT = 46, RIGHT = 12, TOP = 8, BELOW = 22, NEAR = 28;
  const shown = new Map();                                            // hosts, and what they show

  function shape(parent, tag, className, attributes, text) {
    const made = document.createElementNS(SPACE, tag);
    made.setAttribute("class", className);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const plain = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? words.number(v).replace(/\.?0+e/, "e") : String(+v.toPrecision(4))).replaceAll("-", "−");
  const roundStep = (rough) => { const power = 10 ** Math.floor(Math.log10(rough)); return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * .8); };

  // An axis: where a number lies between 0 and 1, and where lines are drawn.
  function scale({log = false, low, high, ticks, format = plain}, values, parts) {
    const usable = values.filter((v) => Number.isFinite(v) && (!log || v > 0));
    const map = log ? Math.log10 : (v) => v;
    let a = map(low ?? Math.min(...usable)), b = map(high ?? Math.max(...usable));
    if (!(a <= b)) [a, b] = log ? [-1, 0] : [0, 1];
    const pad = (b - a || Math.abs(a) || 1) * .05;
    if (low === undefined) a -= pad;
    if (high === undefined) b += pad;
    if (a === b) b = a + 1;
    if (!ticks && log) {
      const each = Math.max(1, Math.ceil((b - a) / parts));
      ticks = [];
      for (let k = Math.ceil(a); k <= b; k += each) ticks.push(10 ** k);
      if (ticks.length < 2) ticks = [1, 2, 5].flatMap((f) => [Math.floor(a), Math.floor(a) + 1].map((k) => f * 10 ** k)).filter((v) => map(v) >= a && map(v) <= b).sort((p, q) => p - q);
    } else if (!ticks) {
      const step = roundStep((b - a) / parts);
      ticks = [];
      for (let k = Math.ceil(a / step - 1e-9); k * step <= b + 1e-9 * step; k++) ticks.push(+(k * step).toPrecision(12));
    }
    return {at: (v) => (map(v) - a) / (b - a), ticks: ticks.filter((v) => map(v) >= a - 1e-9 && map(v) <= b + 1e-9), format, fits: (v) => Number.isFinite(v) && (!log || v > 0)};
  }

  // Texts beside their points: to the right, or where there is no room to the left, and up or down until none lies on another.
  function placeMarks(marks, width, base) {
    const taken = marks.map(({a, b}) => [a - 5, a + 5, b - 5, b + 5]);
    const moves = [0, 14, -14, 28, -28, 42, -42, 56, -56];
    marks.forEach(({group, a, b, text}, own) => {
      const long = 6.5 * text.length;
      const places = moves.flatMap((by) => [[a + 8, b + by, "start"], [a - 8, b + by, "end"]]).map(([x, y, anchor]) => [anchor === "end" ? x - long : x, y, x, anchor])
        .filter(([left, y]) => left >= 0 && left + long <= width && y > 8 && y < base);
      const overlaps = ([left, y]) => taken.some(([x1, x2, y1, y2], i) => i !== own && left < x2 && left + long > x1 && y - 7 < y2 && y + 7 > y1);
      const [left, y, x, anchor] = places.find((place) => !overlaps(place)) ?? places[0] ?? [a + 8, b, a + 8, "start"];
      shape(group, "text", "mark", {x: x.toFixed(1), y: (y + 4).toFixed(1), "text-anchor": anchor}, text);
      taken.push([left, left + long, y - 7, y + 7]);
    });
  }

  function draw(host, spec) {
    const width = Math.max(200, host.clientWidth || 480), height = spec.height ?? 220;
    const flat = spec.series.filter((s) => s.points.length);
    const xs = flat.flatMap((s) => s.kind === "rows" ? [] : s.points.flatMap((p) => s.kind === "bars" ? [p[0], p[4]] : [p[0]]));
    const ys = flat.flatMap((s) => s.kind === "rules" ? [] : s.points.map((p) => p[1]));
    const x = scale(spec.x, xs, Math.max(2, Math.floor(width / 90))), y = scale(spec.y, ys, Math.max(2, Math.floor(height / 45)));
    const below = BELOW + (spec.x.label ? 16 : 0), above = TOP + (spec.y.label ? 16 : 0);
    const px = (v) => LEFT + x.at(v) * (width - LEFT - RIGHT), py = (v) => height - below - y.at(v) * (height - below - above);
    const svg = document.createElementNS(SPACE, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", spec.label);
    const [base, roof] = [height - below, above], clip = (v) => Math.max(roof, Math.min(base, v));
    for (const tick of y.ticks) {
      shape(svg, "line", "grid", {x1: LEFT, x2: width - RIGHT, y1: py(tick), y2: py(tick)});
      shape(svg, "text", "tick", {x: LEFT - 6, y: py(tick) + 4, "text-anchor": "end"}, y.format(tick));
    }
    for (const tick of x.ticks) shape(svg, "text", "tick", {x: px(tick), y: base + 15, "text-anchor": "middle"}, x.format(tick));
    shape(svg, "line", "axis", {x1: LEFT, x2: width - RIGHT, y1: base, y2: base});
    if (spec.x.label) shape(svg, "text", "label", {x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle"}, spec.x.label);
    if (spec.y.label) shape(svg, "text", "label", {x: 0, y: 10}, spec.y.label);
    const found = [], marks = [];                                     // what the pointer can meet, and texts at points
    for (const series of flat) {
      const group = shape(svg, "g", "series", series.colour ? {style: `--c: var(--${series.colour})`} : {});
      const style = series.style ?? "", points = series.points.filter((p) => (series.kind === "rows" || x.fits(p[0])) && (series.kind === "rules" || y.fits(p[1])));
      if (series.kind === "line" || series.kind === "step") {
        let path = "", before;
        for (const p of series.points) {
          if (!points.includes(p)) { before = undefined; continue; }
          const [a, b] = [px(p[0]).toFixed(1), clip(py(p[1])).toFixed(1)];
          path += before === undefined ? `M${a} ${b}` : series.kind === "step" ? `H${a}V${b}` : `L${a} ${b}`;
          before = p;
        }
        shape(group, "path", `line ${style}`, {d: path || "M0 0"});
      }
      for (const p of points) {
        const [a, b] = [series.kind === "rows" ? width / 2 : px(p[0]), series.kind === "rules" ? (roof + base) / 2 : clip(py(p[1]))];
        if (series.kind === "dots") shape(group, "circle", `dot ${style}`, {cx: a.toFixed(1), cy: b.toFixed(1), r: series.size ?? 4});
        if (series.kind === "bars") shape(group, "rect", "bar", {x: a.toFixed(1), y: b.toFixed(1), width: Math.max(.5, px(p[4]) - a - (px(p[4]) - a > 4 ? 1 : 0)).toFixed(1), height: Math.max(0, base - b).toFixed(1)});
        if (series.kind === "stems") shape(group, "line", "stem", {x1: a.toFixed(1), x2: a.toFixed(1), y1: base, y2: b.toFixed(1)});
        if (series.kind === "rules") shape(group, "line", "rule", {x1: a.toFixed(1), x2: a.toFixed(1), y1: base, y2: roof});
        if (series.kind === "rows") shape(group, "line", "rule", {x1: LEFT, x2: width - RIGHT, y1: b.toFixed(1), y2: b.toFixed(1)});
        if (p[2]) found.push({a: series.kind === "bars" ? (a + px(p[4])) / 2 : a, b, text: p[2], pick: p[3], across: series.kind === "bars"});
      }
      if (series.mark && points.length) { const p = points[points.length - 1]; marks.push({group, a: px(p[0]), b: clip(py(p[1])), text: series.mark}); }
    }
    placeMarks(marks, width, base);
    const tip = element("output"); tip.hidden = true;
    let near;
    function seek(event) {
      const box = svg.getBoundingClientRect(), a = (event.clientX - box.left) * width / box.width, b = (event.clientY - box.top) * height / box.height;
      const away = (f) => f.across ? Math.abs(f.a - a) : Math.hypot(f.a - a, f.b - b);
      near = found.reduce((best, f) => away(f) < NEAR && (!best || away(f) < away(best)) ? f : best, undefined);
      $(".near", svg)?.remove();
      tip.hidden = !near;
      svg.style.cursor = near?.pick !== undefined && spec.onpick ? "pointer" : "";
      if (!near) return;
      shape(svg, "circle", "near", {cx: near.a, cy: near.b, r: 6});
      tip.textContent = near.text;
      const left = near.a * box.width / width, right = left > box.width / 2;
      tip.style.left = right ? "" : `${left + 12}px`; tip.style.right = right ? `${box.width - left + 12}px` : "";
      tip.style.top = `${Math.max(0, near.b * box.height / height - 12)}px`;
    }
    svg.addEventListener("pointermove", seek);
    svg.addEventListener("pointerdown", seek);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; $(".near", svg)?.remove(); });
    svg.addEventListener("click", () => { if (near?.pick !== undefined) spec.onpick?.(near.pick); });
    const keys = element("p", "", "chart-keys");
    for (const series of flat.filter((s) => s.name)) {
      const key = element("span"), sign = element("i", "", series.kind === "dots" ? series.style === "open" ? "open" : "dot" : series.kind === "bars" ? "bar" : `${series.kind === "rules" || series.kind === "rows" ? "dashed" : series.style ?? ""}`);
      if (series.colour) sign.style.setProperty("--c", `var(--${series.colour})`);
      key.append(sign, series.name);
      keys.append(key);
    }
    host.classList.add("chart");
    host.replaceChildren(svg, tip, ...(keys.childElementCount ? [keys] : []));
    host.dataset.width = host.clientWidth;
  }

  // Drawn again where there is another width for it, on paper too.
  const resized = new ResizeObserver((entries) => { for (const {target} of entries) if (shown.has(target) && target.clientWidth && +target.dataset.width !== target.clientWidth) draw(target, shown.get(target)); });

  return (host, spec) => {
    shown.set(host, spec);
    draw(host, spec);
    resized.observe(host);
  };
})();
