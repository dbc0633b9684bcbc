// The original and what is left of it, side by side on one canvas, with a line between them that can be moved.
const view = (() => {
  const stage = $("[data-test=stage]"), canvas = $("canvas", stage), context = canvas.getContext("2d");
  const controls = {bits: $("[name=bits]"), split: $("[name=split]")}, NEAR = 18, MOST = 64;
  let zoom = 0, middle = [.5, .5], asked = false, error;                // zoom 0: as large as fits

  const size = () => [stage.clientWidth, stage.clientHeight];
  const fitting = (one) => Math.min(size()[0] / one.width, size()[1] / one.height);
  function place() {
    const one = store.shown, scale = zoom || fitting(one), [wide, high] = size(), width = one.width * scale, height = one.height * scale;
    const along = (room, length, at) => length <= room ? (room - length) / 2 : Math.min(0, Math.max(room - length, room / 2 - at * length));
    const left = along(wide, width, middle[0]), top = along(high, height, middle[1]), from = Math.max(0, left), until = Math.min(wide, left + width);
    return {scale, left, top, width, height, from, until, line: from + controls.split.value / 100 * (until - from)};
  }

  function paint() {
    asked = false;
    const one = store.shown;
    if (!one?.canvas) return;
    const ratio = devicePixelRatio || 1, [wide, high] = size(), at = place();
    if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(high * ratio)) { canvas.width = Math.round(wide * ratio); canvas.height = Math.round(high * ratio); }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, wide, high);
    context.imageSmoothingEnabled = at.scale * ratio < 1;
    context.imageSmoothingQuality = "high";
    const right = store.state.side === "error" ? error : one.at.get(store.state.bits)?.canvas;
    for (const [drawn, from, until] of [[one.canvas, 0, at.line], [right, at.line, wide]]) {
      if (!drawn) continue;
      context.save();
      context.beginPath(); context.rect(from, 0, until - from, high); context.clip();
      context.drawImage(drawn, at.left, at.top, at.width, at.height);
      context.restore();
    }
    const top = Math.max(0, at.top), bottom = Math.min(high, at.top + at.height), half = (top + bottom) / 2;
    for (const [colour, width] of [["#000a", 4], ["#fff", 2]]) {
      context.strokeStyle = colour; context.lineWidth = width;
      context.beginPath(); context.moveTo(at.line, top); context.lineTo(at.line, bottom); context.stroke();
    }
    context.fillStyle = "#fff"; context.strokeStyle = "#000a"; context.lineWidth = 1;
    context.beginPath(); context.arc(at.line, half, 13, 0, 7); context.fill(); context.stroke();
    context.strokeStyle = "#222"; context.lineWidth = 2;
    context.beginPath();
    for (const side of [-1, 1]) { context.moveTo(at.line + side * 4, half - 4); context.lineTo(at.line + side * 8, half); context.lineTo(at.line + side * 4, half + 4); }
    context.stroke();
  }
  function draw() { if (!asked) { asked = true; requestAnimationFrame(paint); } }

  // Everything that is said about what is drawn.
  function say() {
    const {bits, side} = store.state, one = store.shown, scale = place().scale, depths = [...store.depths()].reverse();
    controls.bits.max = depths.length - 1;
    controls.bits.value = depths.indexOf(bits);
    controls.bits.setAttribute("aria-valuetext", figure.bits(bits));
    $("[data-test=bits-said]").value = figure.bits(bits);
    $("[data-test=split-said]").value = `${controls.split.value} %`;
    controls.split.setAttribute("aria-valuetext", `original left of ${controls.split.value} %`);
    $("[data-test=zoom-said]").value = `${+(100 * scale).toPrecision(3)} %${zoom ? "" : ", fits"}`;
    $("[data-test=chip]").textContent = side === "error" ? `error of ${figure.bits(bits)}` : figure.bits(bits);
    canvas.setAttribute("aria-label", `${one.name}: the original left of the line, ${side === "error" ? "the error of " : ""}${figure.bits(bits)} right of it`);
    stage.classList.toggle("zoomed", place().width > size()[0] + 1 || place().height > size()[1] + 1);
  }
  function refresh() { say(); draw(); }

  // Zoom to a scale, with the pixel at a place of the stage staying where it is.
  function to(scale, x = size()[0] / 2, y = size()[1] / 2) {
    const one = store.shown, before = place(), [wide, high] = size(), fit = fitting(one);
    const pixel = [(x - before.left) / before.width, (y - before.top) / before.height];
    zoom = scale <= fit * 1.01 ? 0 : Math.min(MOST, scale);
    if (zoom) middle = [pixel[0] + (wide / 2 - x) / (one.width * zoom), pixel[1] + (high / 2 - y) / (one.height * zoom)].map((at) => Math.min(1, Math.max(0, at)));
    refresh();
  }
  // The next power of two.
  const step = (way) => { const scale = Math.log2(place().scale); return 2 ** (way > 0 ? Math.floor(scale + 1.001) : Math.ceil(scale - 1.001)); };
  function move(across, down) {
    const at = place();
    middle = [Math.min(1, Math.max(0, middle[0] - across / at.width)), Math.min(1, Math.max(0, middle[1] - down / at.height))];
    refresh();
  }
  function split(x) {
    const at = place();
    controls.split.value = Math.round(100 * Math.min(1, Math.max(0, (x - at.from) / (at.until - at.from))));
    refresh();
  }

  async function showError() {
    const {index, bits, side} = store.state, said = $("[data-test=error-said]");
    said.hidden = side !== "error";
    if (side !== "error") return refresh();
    const found = await store.ask("error", {index, bits, settings: store.settings()});
    if (store.state.index !== index || store.state.bits !== bits || store.state.side !== "error") return undefined;
    error = store.draw(found.rgba, store.shown);
    said.textContent = found.most ? `Black lost nothing; the brightest is off by ${found.most.toLocaleString("en")} of ${found.top.toLocaleString("en")}.` : "All black: nothing is lost.";
    return refresh();
  }

  let held;
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    const [x, y] = at(event), zoomed = stage.classList.contains("zoomed");
    held = {x, y, what: zoomed && Math.abs(x - place().line) > NEAR ? "picture" : "line"};
    canvas.setPointerCapture(event.pointerId);
    if (held.what === "line") split(x);
    stage.dataset.held = held.what;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (!held) { canvas.style.cursor = Math.abs(x - place().line) <= NEAR || !stage.classList.contains("zoomed") ? "col-resize" : "grab"; return; }
    if (held.what === "line") split(x);
    else { move(x - held.x, y - held.y); held = {...held, x, y}; }
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = undefined; delete stage.dataset.held; });
  canvas.addEventListener("wheel", (event) => { if (event.ctrlKey || event.metaKey) { event.preventDefault(); to(place().scale * 2 ** (-event.deltaY / 200), ...at(event)); } }, {passive: false});
  canvas.addEventListener("dblclick", (event) => to(zoom ? 0 : 8, ...at(event)));
  canvas.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
    if (!way) return;
    event.preventDefault();
    if (stage.classList.contains("zoomed")) move(...way.map((one) => one * 60));
    else if (way[0]) { controls.split.value -= 2 * way[0]; refresh(); }
  });
  controls.split.addEventListener("input", refresh);
  new ResizeObserver(refresh).observe(stage);
  Object.assign(frame.actions, {in: () => to(step(1)), out: () => to(step(-1)), fit: () => to(0), pixels: () => to(8)});
  return {
    refresh, showError, split(share) { controls.split.value = share; refresh(); },
    // Another picture: its own shape, and all of it.
    reset() { zoom = 0; middle = [.5, .5]; error = undefined; stage.style.setProperty("--shape", Math.min(4, Math.max(.8, store.shown.width / store.shown.height))); refresh(); },
  };
})();
