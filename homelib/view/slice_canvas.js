// A slice as a picture: drawn pixel by pixel from a PNG, with letters, a bar in mm and a cross over it. It tells the kernel what is clicked and which keys are pressed.
const KEYS = {
  ArrowLeft: { kind: "step", across: -1, down: 0 },
  ArrowRight: { kind: "step", across: 1, down: 0 },
  ArrowUp: { kind: "step", across: 0, down: -1 },
  ArrowDown: { kind: "step", across: 0, down: 1 },
  PageUp: { kind: "slice", by: 1 },
  PageDown: { kind: "slice", by: -1 },
};

function part(parent, name, tag = "div") {
  const made = document.createElement(tag);
  made.className = name;
  parent.append(made);
  return made;
}

function render({ model, el }) {
  const frame = part(el, "home-slice");
  const canvas = part(frame, "home-canvas", "canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys for its cells
  const lines = ["home-across", "home-down"].map((name) => part(frame, name));
  const letters = ["left", "right", "top", "bottom"].map((side) => part(frame, "home-letter home-" + side));
  const bar = part(frame, "home-bar");
  let newest = 0;

  async function draw() {
    const mine = ++newest;
    const about = model.get("about");
    const png = new Blob([model.get("png")], { type: "image/png" });
    const picture = await createImageBitmap(png, { colorSpaceConversion: "none" });
    if (mine !== newest) return; // a later one is on its way
    if (canvas.width !== picture.width || canvas.height !== picture.height) {
      canvas.width = picture.width;
      canvas.height = picture.height;
    }
    canvas.getContext("2d").drawImage(picture, 0, 0);
    frame.style.width = about.width_px + "px";
    canvas.style.aspectRatio = about.aspect;
    canvas.setAttribute("aria-label", about.told);
    canvas.dataset.slice = about.slice;
    letters.forEach((letter, i) => (letter.textContent = about.letters[i]));
    bar.style.width = 100 * about.bar_share + "%";
    bar.textContent = about.bar_mm + " mm";
    lines.forEach((line) => (line.hidden = !about.cross));
    if (about.cross) {
      lines[0].style.top = 100 * about.cross[1] + "%";
      lines[1].style.left = 100 * about.cross[0] + "%";
    }
  }

  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    model.send({ kind: "pick", across: (event.clientX - box.left) / box.width, down: (event.clientY - box.top) / box.height });
  });
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    model.send(KEYS[event.key]);
  });
  model.on("change:number", draw);
  draw();
  return () => model.off("change:number", draw);
}

export default { render };
