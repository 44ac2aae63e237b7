"use strict";
// The two charts, drawn by Vega from the data of the page; the colours are the page's own custom properties,
// so that they follow the theme by themselves.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const looks = new Map(data.looks.map((look) => [look.method, look]));
  const select = document.getElementById("measure");
  const tip = window.qexportTip = makeTip();
  const charts = data.costs.map((cost) => ({ cost, place: document.getElementById(`chart-${cost.key}`) }));

  const MARGIN = { left: 44, right: 10, top: 26, bottom: 44 };

  // One tip for the page: shown beside what is hovered or focused. Texts go in as texts, never as HTML.
  function makeTip() {
    const box = document.getElementById("tip");
    const line = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
    return {
      show(target, head, pairs) {
        box.replaceChildren();
        if (head) box.append(line("strong", head));
        const list = document.createElement("dl");
        for (const [name, value] of pairs) list.append(line("dt", name), line("dd", value));
        if (pairs.length) box.append(list);
        box.hidden = false;
        const at = target.getBoundingClientRect();
        const room = 8;
        const wide = document.documentElement.clientWidth;
        const left = Math.min(Math.max(room, at.x + at.width / 2 - box.offsetWidth / 2), wide - box.offsetWidth - room);
        const above = at.y - box.offsetHeight - room;
        box.style.left = `${Math.max(room, left)}px`;
        box.style.top = `${above < room ? at.bottom + room : above}px`;
      },
      hide() { box.hidden = true; },
    };
  }

  function describe(point) {
    return [point.variant, ...point.tip.map(([name, value]) => `${name} ${value}`)].join(", ");
  }

  function spec(cost, measure, width) {
    const points = measure.points.map((point) => ({
      ...point,
      x: point[cost.key],
      onFront: point.front[cost.key],
      rank: point.full ? 0 : point.front[cost.key] ? 1 : 2,
      colour: looks.get(point.method).colour,
      path: looks.get(point.method).path,
      text: describe(point),
    }));
    // the points on the front are drawn last: on top
    points.sort((a, b) => a.onFront - b.onFront);
    const front = points.filter((point) => point.onFront).sort((a, b) => a.x - b.x || (a.value - b.value));
    const x = { scale: "x", field: "x" };
    const type = measure.scale.type;
    const plain = { labels: { update: { text: { signal: "format(datum.value, ',.6~f')" } } } };  // never 3e+2
    return {
      // fixed margins: while Vega measures its own, the chart has no width, and labels cannot be placed
      autosize: "none",
      width: Math.max(width - MARGIN.left - MARGIN.right, 120),
      height: width < 440 ? 240 : 290,
      padding: MARGIN,
      description: `${measure.title} against ${cost.title}: ${points.length} points; ${measure.better} is better.`,
      title: { text: `${measure.title}, ${measure.better} is better`, anchor: "start", frame: "group", offset: 10 },
      data: [{ name: "rows", values: points }, { name: "front", values: front }],
      scales: [
        { name: "x", type: "log", domain: cost.domain, range: "width", nice: false, zero: false },
        {
          name: "y", type, domain: measure.scale.domain, range: "height", nice: false, zero: false,
          ...(type === "symlog" ? { constant: measure.scale.constant } : {}),
        },
      ],
      axes: [
        { orient: "bottom", scale: "x", values: cost.ticks, title: cost.title, grid: true, encode: plain },
        { orient: "left", scale: "y", values: measure.ticks, grid: true, encode: plain },
      ],
      marks: [
        {
          type: "line", from: { data: "front" }, aria: false, interactive: false,
          encode: { enter: {
            x, y: { scale: "y", field: "value" }, interpolate: { value: "step-after" },
            stroke: { value: "var(--muted)" }, strokeWidth: { value: 1.5 }, strokeDash: { value: [5, 4] },
          } },
        },
        {
          type: "rule", from: { data: "rows" }, aria: false, interactive: false, clip: true,
          encode: { enter: {
            x, y: { scale: "y", field: "low" }, y2: { scale: "y", field: "high" },
            stroke: { field: "colour" }, strokeWidth: { value: 1.5 },
          } },
        },
        {
          type: "symbol", name: "points", from: { data: "rows" },
          encode: { enter: {
            x, y: { scale: "y", field: "value" }, shape: { field: "path" }, fill: { field: "colour" },
            size: { signal: "datum.full ? 190 : 110" },
            stroke: { value: "var(--ground)" }, strokeWidth: { value: 1 },
            description: { field: "text" },
          } },
        },
        {
          type: "text", name: "names", from: { data: "points" }, aria: false, interactive: false,
          encode: { enter: {
            text: { field: "datum.variant" }, fontSize: { value: 11 },
            fill: { signal: "datum.datum.rank < 2 ? 'var(--ink)' : 'var(--muted)'" },
          } },
          transform: [{
            type: "label", size: { signal: "[width, height]" }, offset: [5],
            // where the front's steps do not run: they go right, then to the better side
            anchor: measure.better === "lower"
              ? ["top-right", "bottom-left", "top", "top-left", "bottom", "bottom-right", "left"]
              : ["bottom-right", "top-left", "bottom", "top", "bottom-left", "top-right", "left"],
            sort: { field: "datum.datum.rank" },
          }],
        },
      ],
      config: {
        background: "transparent",
        title: { color: "var(--muted)", fontSize: 12, fontWeight: "normal", font: "inherit" },
        axis: {
          domain: false, ticks: false, gridColor: "var(--line)", labelColor: "var(--muted)", labelFontSize: 11,
          titleColor: "var(--muted)", titleFontSize: 12, titleFontWeight: "normal", labelPadding: 6,
          titlePadding: 8, labelFont: "inherit", titleFont: "inherit", labelOverlap: true,
        },
        text: { font: "inherit" },
        view: { stroke: null },
      },
    };
  }

  // In Tab order a chart is one stop; the arrow keys go from point to point by what it costs.
  function reach(chart) {
    const nodes = [...chart.place.querySelectorAll(".points > path")];
    nodes.sort((a, b) => a.__data__.datum.x - b.__data__.datum.x);
    nodes.forEach((node, index) => {
      node.setAttribute("tabindex", index ? "-1" : "0");
      node.addEventListener("focus", () => show(chart, node));
      node.addEventListener("blur", () => hide(chart));
      node.addEventListener("keydown", (event) => {
        const steps = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1,
          Home: 0, End: nodes.length - 1 };
        const next = nodes[steps[event.key]];
        if (!next) return;
        event.preventDefault();
        nodes.forEach((other) => other.setAttribute("tabindex", other === next ? "0" : "-1"));
        next.focus();
      });
    });
    chart.nodes = nodes;
  }

  function show(chart, node) {
    const point = node.__data__.datum;
    chart.nodes.forEach((other) => other.classList.toggle("on", other === node));
    tip.show(node, point.variant, point.tip);
  }

  function hide(chart) {
    chart.nodes.forEach((node) => node.classList.remove("on"));
    tip.hide();
  }

  // The nearest point within reach of a finger: the marks themselves are small.
  function nearest(chart, event) {
    let found = null;
    let least = 26;
    for (const node of chart.nodes || []) {
      const at = node.getBoundingClientRect();
      const away = Math.hypot(at.x + at.width / 2 - event.clientX, at.y + at.height / 2 - event.clientY);
      if (away < least) [found, least] = [node, away];
    }
    return found;
  }

  async function draw(chart) {
    const measure = data.measures.find((one) => one.key === select.value) || data.measures[0];
    chart.width = chart.place.clientWidth;
    chart.result?.finalize();
    chart.result = await vegaEmbed(chart.place, spec(chart.cost, measure, chart.width), {
      mode: "vega", renderer: "svg", actions: false, tooltip: false, hover: false, defaultStyle: false,
      ast: true,  // expressions are interpreted: the page's policy allows no eval
    });
    reach(chart);
    chart.place.dataset.drawn = measure.key;
  }

  for (const chart of charts) {
    chart.place.addEventListener("pointermove", (event) => {
      const node = nearest(chart, event);
      if (node) show(chart, node);
      else if (!chart.nodes?.includes(document.activeElement)) hide(chart);
    });
    chart.place.addEventListener("pointerleave", () => hide(chart));
    new ResizeObserver(() => {
      if (chart.place.clientWidth !== chart.width) draw(chart);
    }).observe(chart.place);
  }
  select.addEventListener("change", () => charts.forEach(draw));
})();
