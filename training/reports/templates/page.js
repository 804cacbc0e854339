// Draws the curves of each .plot with uPlot. The legend shows each curve's value and step under the pointer; dragging
// enlarges a stretch of steps, and a double click shows all of them again.
const shown = (value) => {
  if (value == null) return "–";
  const text = Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(4));
  return text.replace("-", "−");
};
const whole = Array.from({length: 30}, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));

function draw(place) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const curves = JSON.parse(place.dataset.curves);
  const series = curves.map(({label}) => {
    const heldOut = label === "held out", stroke = colour(heldOut ? "held-out" : "training");
    return {
      label, stroke, width: 1.2, points: heldOut ? {show: true, size: 7, fill: stroke} : {size: 4, fill: stroke},
      value: (plot, value, _, index) => index == null ? "–" : `${shown(value)} @ ${shown(plot.data[0][index])}`,
    };
  });
  const axis = {stroke: colour("soft"), grid: {stroke: colour("line"), width: 1}, ticks: {show: false}, font: "11px system-ui"};
  const ticks = (_, values) => values.map((value) => String(+value.toPrecision(8)).replace("-", "−"));
  place.plot?.destroy();
  place.plot = new uPlot({
    width: place.clientWidth, height: 200, scales: {x: {time: false}}, padding: [8, 14, 0, 0], cursor: {y: false},
    series: [{}, ...series],
    axes: [
      {...axis, grid: {show: false}, size: 24, gap: 6, incrs: whole, label: "step", labelSize: 14, labelGap: 0, labelFont: axis.font},
      {...axis, size: 54, space: 28, values: ticks},
    ],
  }, uPlot.join(curves.map(({points}) => points)), place);
}

const drawAll = () => document.querySelectorAll(".plot").forEach(draw);
drawAll();
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
