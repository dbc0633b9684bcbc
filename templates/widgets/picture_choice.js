// Which picture, how it is quantized, and pictures that are opened, dropped or pasted.
const choice = (() => {
  const {state} = store, message = $("[data-test=message]"), input = $("[type=file]"), list = $("[data-test=pictures]");
  const LABELS = {picture: {picture: "the picture", channel: "each channel", tile: "each tile"}, layer: {picture: "the layer", channel: "each channel", tile: "each channel"}};

  function refresh() {
    const one = store.shown, grey = one.channels === 1;
    for (const input of $$(".choice .setting input[type=radio]")) input.checked = input.name === "picture" ? +input.value === state.index : state.settings[input.name] === input.value;
    $("[data-setting=channels]").disabled = grey;
    $("[data-setting=range]").disabled = state.settings.levels === "palette";
    for (const input of $$("[name=range]")) { input.nextSibling.textContent = LABELS[one.kind][input.value]; if (input.value === "channel") input.parentNode.hidden = grey; }
    if (grey && state.settings.range === "channel") $("[name=range]").checked = true;
  }
  async function select(index) { state.index = index; refresh(); await gallery.select(index); }

  // A small copy beside each name: those that are there from the start have one.
  for (const [index, span] of $$("span", list).entries()) span.prepend(Object.assign($(".gallery img", gallery.section(index)).cloneNode(), {alt: ""}));
  function enlist(index) {
    const one = store.pictures[index], label = element("label"), radio = element("input"), span = element("span", one.name), small = element("canvas");
    Object.assign(radio, {type: "radio", name: "picture", value: index});
    small.width = 56; small.height = Math.max(1, Math.round(56 * one.height / one.width));
    small.getContext("2d").drawImage(one.canvas, 0, 0, small.width, small.height);
    small.setAttribute("aria-hidden", "true");
    span.prepend(small);
    label.append(radio, span);
    list.append(label);
  }

  async function open(files) {
    const wrong = [];
    let first;
    message.hidden = true;
    for (const file of files) {
      const later = setTimeout(() => frame.say(`Opening ${words.visible(file.name)} …`), 300);
      try {
        const index = await store.open(file);
        gallery.add(index); enlist(index);
        if (first === undefined) { first = index; select(index); }
      } catch (error) { wrong.push(`“${words.visible(file.name)}” ${error.message}.`); }
      clearTimeout(later);
    }
    message.hidden = !wrong.length;
    message.textContent = wrong.join(" ");
    root.dataset.opened = (+root.dataset.opened || 0) + files.length;
  }

  $(".choice").addEventListener("change", (event) => {
    const {name, value} = event.target;
    if (name === "picture") select(+value);
    else if (name in state.settings) { state.settings[name] = value; refresh(); gallery.compute(); }
  });
  $(".viewer").addEventListener("input", (event) => {
    if (event.target.name === "bits") gallery.setBits([...store.depths()].reverse()[event.target.value]);
    if (event.target.name === "side") { state.side = event.target.value; view.showError(); }
  });
  input.addEventListener("change", () => { const files = [...input.files]; input.value = ""; if (files.length) open(files); });
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => { if (carries(event)) { event.preventDefault(); root.classList.add("dropping"); } });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) root.classList.remove("dropping"); });
  document.addEventListener("drop", (event) => { root.classList.remove("dropping"); if (carries(event)) { event.preventDefault(); open([...event.dataTransfer.files]); } });
  document.addEventListener("paste", (event) => { const files = [...event.clipboardData?.files ?? []]; if (files.length) open(files); });
  for (const button of $$("[data-layer]")) button.addEventListener("click", async () => {
    await select(+button.dataset.layer);
    $(".viewer").scrollIntoView({block: "start"});
    $("[data-test=canvas]").focus({preventScroll: true});
  });

  // ------------------------------------------------------------------------------------------ downloads and keys
  const name = () => store.shown.name.replace(/\.\w+$/, "").replace(/[^\w.-]+/g, "_");
  const lines = () => ["original", ...store.depths()].map((bits) => [bits, bits === "original" ? store.shown.original : store.shown.at.get(bits)]);
  Object.assign(frame.actions, {
    csv() { frame.save(`${name()}_quantized.csv`, frame.csv(lines().map(([bits, found]) => ({picture: store.shown.name, depth: bits, ...store.settings(), ...Object.fromEntries(Object.keys(figure.titles).map((key) => [key, found?.[key]]))}))), "text/csv"); },
    markdown() {
      const {channels, levels, rounding, range} = store.settings();
      frame.copy([`**${frame.escape(store.shown.name)}** (${channels}, ${levels}, ${rounding}, one range for each ${range})`, "", ...frame.markdown([["depth"], ...Object.values(figure.titles).map((title) => [title, true])], lines().map(([bits, found]) => [figure.bits(bits), ...Object.keys(figure.titles).map((key) => figure.cell(found, key))]))].join("\n"));
    },
    async png() { const {bits, index} = state, {blob} = await store.ask("png", {index, bits, settings: store.settings()}); frame.save(`${name()}_${figure.bits(bits).replace(" ", "_")}.png`, blob); },
  });
  const less = () => gallery.step(-1), more = () => gallery.step(1), {in: closer, out, fit} = frame.actions;
  Object.assign(frame.keys, {j: less, k: more, "[": less, "]": more, "+": closer, "=": closer, "-": out, 0: fit, e() { const other = $("[name=side]:not(:checked)"); other.checked = true; state.side = other.value; view.showError(); }});
  return {select, refresh};
})();
