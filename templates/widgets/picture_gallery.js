// The small pictures of all depths and the table of each picture, and the figures beside the view of the one that is shown.
const gallery = (() => {
  const {state, pictures} = store, busy = $("[data-test=busy]");
  const ASIDE = 320;                                                   // sides of a small copy
  let turn = 0, seen;
  const drawn = new Promise((done) => { seen = done; });               // the first picture stands there
  const section = (index) => $(`.picture[data-i="${index}"]`);

  // A card and a row for each depth; those of the page's start are there already.
  function arrange(index = state.index) {
    const home = section(index), list = $(".gallery", home), body = $("tbody", home), wanted = ["original", ...store.depths(pictures[index])];
    for (const bits of wanted) for (const parent of [list, body]) {
      let node = [...parent.children].find((one) => one.dataset.bits === String(bits));
      if (!node) {
        node = parent.children[1].cloneNode(true);
        node.dataset.bits = bits;
        (parent === list ? $("b", node) : $("th", node)).textContent = figure.bits(bits);
      }
      parent.append(node);
    }
    for (const parent of [list, body]) for (const node of [...parent.children]) node.hidden = !wanted.map(String).includes(node.dataset.bits);
  }

  // What is known of a depth. Pictures that are not shown have small copies alone, so that many of them take little memory.
  function known(bits, index) {
    const one = pictures[index];
    return bits === "original" ? one.original : (index === state.index ? one : one.aside ?? one).at.get(bits);
  }
  function fill(bits, index = state.index) {
    const one = pictures[index], home = section(index), found = known(bits, index), query = `[data-bits="${bits}"]`;
    for (const cell of $$(`tbody ${query} td`, home)) cell.textContent = figure.cell(found, cell.dataset.of);
    const card = $(`.gallery ${query}`, home), canvas = bits === "original" ? one.canvas : found?.canvas;
    $(".said span", card).textContent = figure.cell(found, bits === "original" ? "png_bytes" : "psnr");
    if (canvas && card.firstChild.firstChild !== canvas) {
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${one.name}, ${figure.bits(bits)}`);
      card.firstChild.firstChild.replaceWith(canvas);
    }
    if (bits === state.bits && index === state.index) facts();
  }

  function facts() {
    const found = store.shown.at.get(state.bits), list = $("[data-test=facts]");
    $("[data-test=facts-title]").textContent = `${figure.bits(state.bits)[0].toUpperCase()}${figure.bits(state.bits).slice(1)} ${isLayer() ? "for each weight" : state.settings.levels === "palette" || store.shown.channels === 1 || state.settings.channels === "luminance" ? "for each pixel" : "for each channel"}`;
    list.replaceChildren(...Object.entries(figure.titles).map(([name, title]) => {
      const row = element("div");
      row.append(element("dt", isLayer() ? title.replace("pixel", "weight") : title), element("dd", figure.cell(found, name)));
      row.dataset.of = name;
      return row;
    }));
    histogram(found); cost();
    for (const node of $$(".picture:not(.on) [data-on]")) node.removeAttribute("data-on");
    for (const node of $$("[data-bits]", section(state.index))) node.toggleAttribute("data-on", node.dataset.bits === String(state.bits));
    for (const button of $$(".gallery button")) button.setAttribute("aria-pressed", button.closest(".picture.on") !== null && button.parentNode.dataset.bits === String(state.bits));
  }

  const layer = () => store.payload.layers[state.index - store.payload.pictures.length + store.payload.layers.length];
  const isLayer = () => store.shown.kind === "layer";

  function histogram(found) {
    const one = store.shown, said = $("[data-test=histogram-said]"), top = 2 ** one.depth - 1, parts = 64, bars = new Array(parts).fill(0);
    const single = store.settings().range === "picture", grey = state.settings.channels === "luminance";
    let total = 0;
    for (const counts of one.counts) counts.forEach((count, i) => { bars[Math.floor(i * parts / counts.length)] += count; total += count; });
    const [low, high] = isLayer() ? layer().ends : [0, top], real = (value) => low + value / top * (high - low), width = (high - low) / parts, what = isLayer() ? "weights" : "numbers";
    const levels = single && found?.values ? found.values : [], shown = levels.length <= 64 ? levels : [];
    chart($("[data-test=histogram]"), {
      height: 150, label: `Histogram of the ${what}, with the ${levels.length} levels of ${figure.bits(state.bits)}`,
      x: {low, high, ...(isLayer() ? {} : {format: (v) => v.toLocaleString("en")}), label: isLayer() ? "weight" : grey && one.channels > 1 ? "level; the numbers are those of red, green and blue" : "level"}, y: {low: 0, label: `share of the ${what}, %`},
      series: [
        {kind: "bars", name: what, points: bars.map((count, i) => [low + i * width, 100 * count / total, `${words.number(low + i * width)} to ${words.number(low + (i + 1) * width)}\n${words.percent(count / total)}`, undefined, low + (i + 1) * width])},
        ...(shown.length ? [{kind: "rules", name: state.settings.levels === "palette" && one.channels === 3 ? "brightness of the palette’s colours" : "levels", colour: "accent", points: shown.map((value) => [real(value), 0])}] : []),
      ],
    });
    const part = store.settings().range === "tile" ? isLayer() ? "channel" : "tile" : "channel";
    said.textContent = !single ? `Each ${part} has levels of its own, between its lowest and its highest number.` : levels.length > 64 || state.bits > 8 ? `${(2 ** state.bits).toLocaleString("en")} levels stand too close to be drawn.` : "";
  }

  // What the bits of a layer cost its model, where the grid is one that was measured.
  function cost() {
    const said = $("[data-test=cost]"), {levels, rounding, range} = store.settings();
    said.hidden = !isLayer();
    if (!isLayer()) return;
    const one = layer(), grid = levels === "palette" ? "codebook" : range === "tile" ? "channel" : "tensor", found = one.costs[grid].find(([bits]) => bits === state.bits);
    const how = {tensor: "one range for the layer", channel: "a range for each channel", codebook: "a learned codebook"}[grid];
    said.textContent = rounding === "dithered" ? "Weights are not dithered: nobody looks at them from afar. Round to nearest to see what that costs the model."
      : found ? `In the model, this layer with ${figure.bits(state.bits)} and ${how} keeps ${found[1].toFixed(1).replace("-", "−")} dB of the output; ${found[2]} of ${one.samples} digits are read right, ${one.right_before} with all weights as they are.`
      : "At 16 bits nothing is lost that the model would notice.";
  }

  // The same sentence that Python begins the page with, of the picture and settings that are shown.
  function tell() {
    const one = store.shown, four = one.at.get(4), least = one.at.get(1), keeps = (found) => found.psnr === Infinity ? "loses nothing" : `keeps ${figure.decibels(found.psnr)}`;
    const grey = one.channels === 1 || state.settings.channels === "luminance", palette = state.settings.levels === "palette";
    const what = palette ? `a palette of 16 ${grey ? "greys" : "colours"}` : `4 bits for each ${isLayer() ? "weight" : grey ? "pixel" : "channel"}`;
    $("[data-test=verdict]").textContent = four.psnr === Infinity ? `With ${what}, “${one.name}” loses nothing: it has only ${words.count(four.colours, "colour")}.`
      : `With ${what}, “${one.name}” ${keeps(four)}, and its PNG is ${four.ratio < 1 ? "larger" : `${figure.cell(four, "ratio")} times smaller`} than its pixels; with 1 bit it ${keeps(least)}.`;
    $("[data-test=name]").textContent = one.name;
    $("[data-test=about]").textContent = $("h2 small", section(state.index)).textContent;
  }

  // All depths of the picture and settings that are shown, the chosen one first; what is outdated meanwhile stops.
  async function compute() {
    const mine = ++turn, {index} = state, outdated = () => mine !== turn;
    delete root.dataset.shown; delete root.dataset.measured; delete root.dataset.all;
    const later = setTimeout(() => { busy.hidden = false; }, 150);
    try {
      await store.load(index);
      if (outdated()) return;
      const one = store.shown, settings = store.settings(), key = JSON.stringify(settings);
      if (!store.depths().includes(state.bits)) [state.bits] = store.depths();
      if (one.key !== key) { one.key = key; one.at.clear(); }
      one.aside = undefined;
      arrange(); facts();
      for (const bits of ["original", ...store.depths()]) if (bits === "original" || one.at.has(bits) || one.known?.key !== key) fill(bits);
      view.refresh();
      const order = [state.bits, ...store.depths().filter((bits) => bits !== state.bits)];
      for (const bits of order) {
        if (one.at.has(bits)) continue;
        const found = await store.ask("quantize", {index, bits, settings});
        if (outdated()) return;
        const known = one.known?.key === key ? one.known.at.get(bits) : {};
        one.at.set(bits, {...found, ...known, levels: 2 ** bits, canvas: store.draw(found.rgba, one), rgba: undefined});
        fill(bits);
        if (bits === state.bits) { view.showError(); seen(); }
      }
      clearTimeout(later); busy.hidden = true;
      root.dataset.shown = `${index} ${key}`;
      if (!one.original) { const found = await store.ask("original", {index}); one.original = {...found, levels: 2 ** one.depth}; if (outdated()) return; fill("original"); }
      for (const bits of order) {
        if (one.at.get(bits).psnr !== undefined) continue;
        const found = await store.ask("measure", {index, bits, settings});
        if (outdated()) return;
        Object.assign(one.at.get(bits), found);
        fill(bits);
      }
      tell();
      root.dataset.measured = root.dataset.shown = `${index} ${key}`;
      for (const other of pictures.keys()) if (other !== index && pictures[other]?.kind === "picture") await setAside(other, outdated);
      if (!outdated()) root.dataset.all = JSON.stringify(state.settings);
    } finally { clearTimeout(later); if (!outdated()) busy.hidden = true; }
  }

  // A picture that is not shown, with the same settings, for its small pictures and its table.
  async function setAside(index, outdated) {
    const one = pictures[index], settings = store.settings(one), key = JSON.stringify(settings);
    if (!section(index) || outdated() || (one.aside?.key ?? one.key ?? one.known?.key) === key) return;
    await store.load(index);
    if (outdated()) return;
    one.aside = {key: "", at: new Map()};
    arrange(index);
    for (const bits of ["original", ...store.depths(one)]) fill(bits, index);
    for (const bits of store.depths(one)) {
      const found = await store.ask("quantize", {index, bits, settings});
      if (outdated()) return;
      const whole = store.draw(found.rgba, one), canvas = element("canvas"), factor = Math.max(1, Math.max(one.width, one.height) / ASIDE);
      canvas.width = Math.max(1, Math.round(one.width / factor)); canvas.height = Math.max(1, Math.round(one.height / factor));
      canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
      one.aside.at.set(bits, {...found, ...(one.known?.key === key ? one.known.at.get(bits) : await store.ask("measure", {index, bits, settings})), levels: 2 ** bits, canvas, rgba: undefined});
      if (outdated()) return;
      fill(bits, index);
    }
    one.aside.key = key;
  }

  function setBits(bits) {
    if (!store.depths().includes(bits)) return;
    state.bits = bits;
    facts(); view.showError();
  }
  function step(way) { const depths = store.depths(), at = depths.indexOf(state.bits) - way; if (depths[at]) setBits(depths[at]); }

  function select(index) {
    state.index = index;
    delete root.dataset.shown; delete root.dataset.measured;
    for (const one of $$(".picture")) {
      one.classList.toggle("on", +one.dataset.i === index);
      one.hidden = +one.dataset.i !== index && one.classList.contains("layer");
    }
    $(".viewer").after(section(index));                               // its figures next to its view
    return store.load(index).then(() => { if (state.index === index) { view.reset(); return compute(); } return undefined; });
  }

  // A section for a picture that was opened later, made after the first one's.
  function add(index) {
    const one = pictures[index], made = section(0).cloneNode(true), first = pictures[0].name;
    made.dataset.i = index;
    made.className = "picture";
    for (const node of [made, ...$$("[aria-label]", made)]) node.setAttribute("aria-label", node.getAttribute("aria-label").replace(first, one.name));
    $("h2", made).replaceChildren(one.name, " ", element("small", `${one.width} × ${one.height} pixels, ${words.count(one.channels, "channel")} of ${one.depth} bits`));
    $("[data-test=notes]", made).textContent = one.notes.map((note) => `${note[0].toUpperCase()}${note.slice(1)}.`).join(" ");
    $("caption", made).textContent = `What ${one.name} keeps and takes at each depth`;
    $(".gallery", made).classList.toggle("tall", one.height > one.width);
    $(".models").before(made);
  }

  document.addEventListener("click", (event) => {
    const card = event.target.closest(".gallery button");
    if (!card) return;
    const {bits} = card.parentNode.dataset, index = +card.closest(".picture").dataset.i;
    if (index !== state.index) {
      if (bits !== "original") state.bits = +bits;
      choice.select(index);
      $(".viewer").scrollIntoView({block: "start"});
    }
    if (bits === "original") view.split(100); else { setBits(+bits); if ($("[name=split]").value > 90) view.split(50); }
  });
  return {drawn, section, compute, select, add, setBits, step, facts};
})();
