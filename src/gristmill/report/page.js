// Under the pointer, a chart's caption tells the nearest point's figures. The page says everything without it, too.
for (const figure of document.querySelectorAll("[data-readout]")) {
  const points = JSON.parse(figure.dataset.readout);
  const caption = figure.querySelector("figcaption");
  const resting = caption.textContent;
  for (const svg of figure.querySelectorAll("svg[data-plot]")) {
    const [left, right, low, high] = svg.dataset.plot.split(" ").map(Number);
    const cursor = svg.querySelector(".cursor");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const wanted = low + ((at - left) / (right - left)) * (high - low);
      const gap = (point) => Math.abs(point[0] - wanted);
      const nearest = points.reduce((a, b) => (gap(b) < gap(a) ? b : a), points[0]);
      if (!nearest) return;
      const x = left + ((nearest[0] - low) / (high - low)) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      caption.textContent = nearest[1];
    });
    svg.addEventListener("pointerleave", () => {
      cursor.style.visibility = "hidden";
      caption.textContent = resting;
    });
  }
}
