// Draws the charts of a report from the numbers in the page. Nothing is fetched, and nothing moves.
"use strict";
(() => {
  const TEXT = 12; // pixels
  const NARROW = 560; // below, the names of intervals stand above their rows
  const REFERENCE = {stroke: "currentColor", strokeOpacity: 0.65, strokeDasharray: "4 3"};
  const SYMBOLS = {
    circle: d3.symbolCircle,
    square: d3.symbolSquare,
    triangle: d3.symbolTriangle,
    diamond2: d3.symbolDiamond2,
    cross: d3.symbolCross,
  };
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `${TEXT}px ${getComputedStyle(document.body).fontFamily}`;

  const measure = (text) => pen.measureText(text).width;
  const widest = (texts) => d3.max(texts, measure) ?? 0;
  const range = (low, high) => `${number(low)} to ${number(high)}`;

  /** Write a number as the tables of the page do. */
  function number(value) {
    if (value === null || value === undefined) return "\u2014";
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9 || size < 1e-3) {
      const [digits, exponent] = value.toExponential(3).split("e");
      return `${Number(digits)}e${Number(exponent)}`;
    }
    if (size >= 1000 || Number.isInteger(value)) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  }

  const tick = (value) => (Math.abs(value) >= 1e7 ? d3.format(".4~e") : d3.format(",.8~r"))(value).replace("e+", "e");

  /** Break a name into lines that are at most so many pixels wide, after punctuation where it can be. */
  function broken(name, width) {
    const lines = [""];
    for (const part of name.split(/(?<=[,:/\s])/).flatMap((part) => (measure(part) > width ? [...part] : [part]))) {
      if (lines.at(-1) && measure(lines.at(-1) + part) > width) lines.push("");
      lines[lines.length - 1] += part;
    }
    return lines;
  }

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  /** Draw what stands before the text of a legend: a stroke, a symbol, or both. */
  function sample({stroke = "currentColor", width = 0, dash = "", symbol = null, size = 45, hollow = false, faint = 1}) {
    const box = d3.create("svg").attr("width", 34).attr("height", 14).attr("viewBox", "0 -7 34 14");
    box.attr("aria-hidden", "true");
    if (width) {
      const line = box.append("line").attr("x1", 1).attr("x2", 33).attr("stroke", stroke).attr("stroke-width", width);
      line.attr("stroke-dasharray", dash).attr("stroke-opacity", faint);
    }
    if (symbol) {
      const mark = box.append("path").attr("transform", "translate(17,0)").attr("d", d3.symbol(SYMBOLS[symbol], size)());
      mark.attr("fill", hollow ? "none" : stroke).attr("stroke", hollow ? stroke : "none").attr("stroke-width", 1.3);
    }
    return box.node();
  }

  /** Say what the marks mean. One line needs no name: its axis says what it is. */
  function legend(chart) {
    const entries = chart.kind === "intervals" ? meanings(chart) : names(chart);
    if (chart.reference !== null) {
      entries.push([`reference: ${number(chart.reference)}`, {width: 1, dash: "4 3", faint: 0.65}]);
    }
    const items = entries.map(([text, style]) => element("li", {}, sample(style), element("span", {}, text)));
    return items.length ? [element("ul", {class: "legend"}, ...items)] : [];
  }

  function names(chart) {
    const entries = chart.kind === "points" || chart.series.length > 1 ? chart.series.map((series) => entry(chart, series)) : [];
    const band = chart.series.some(({low}) => low.some((value) => value !== null));
    return band ? [...entries, [chart.range_label, {width: 12, faint: 0.25}]] : entries;
  }

  function entry(chart, {name, look}) {
    const lines = chart.kind === "lines";
    const line = lines ? {width: 2, dash: look.dash.join(" ")} : {hollow: true};
    return [name, {stroke: look.colour, symbol: look.symbol, ...line}];
  }

  function meanings({series, range_label, inner_label}) {
    const entries = [];
    if (series.some(({center}) => center !== null)) entries.push(["mean", {symbol: "circle", size: 80}]);
    if (series.some(({inner}) => inner)) entries.push([inner_label, {width: 5}]);
    if (series.some(({low}) => low.length)) entries.push([range_label, {width: 1.5}]);
    if (series.some(({x}) => x.length)) entries.push(["single seeds", {symbol: "circle", size: 25, hollow: true}]);
    return entries;
  }

  /** Show what a row says of itself where the pointer is near it. */
  function tips(rows) {
    const at = {x: "x", y: "y", maxRadius: 60};
    return [
      Plot.dot(rows, Plot.pointer({...at, r: 7, stroke: "currentColor", strokeWidth: 1.5})),
      Plot.tip(rows, Plot.pointer({...at, title: "text", fontSize: TEXT, lineHeight: 1.3, lineWidth: 19})),
    ];
  }

  function pointRows(chart) {
    return chart.series.map(({name, x, y, low, high, labels}) =>
      x.map((at, i) => {
        const lines = [name, `${chart.x_label}: ${number(at)}`, `${chart.y_label}: ${number(y[i])}`];
        if (low.length && high.length && low[i] !== null) lines.push(`${chart.range_label}: ${range(low[i], high[i])}`);
        if (labels.length) lines.push(labels[i]);
        return {x: at, y: y[i], low: low[i], high: high[i], text: lines.join("\n")};
      }),
    );
  }

  function points(chart, width) {
    const rows = pointRows(chart);
    const marks = chart.reference === null ? [] : [Plot.ruleY([chart.reference], REFERENCE)];
    const draw = chart.kind === "lines" ? line : cloud;
    chart.series.forEach((series, i) => marks.push(...draw(series, rows[i])));
    marks.push(...tips(rows.flat().filter(({y}) => y !== null)));
    const [low, high] = d3.extent(rows.flat().flatMap(({y, low, high}) => [y, low, high]));
    const height = Math.min(width < NARROW ? 280 : 380, chart.whole_y ? 120 + 60 * (high - low) : Infinity);
    return {
      height,
      x: axis(chart.x_log, chart.whole_x, d3.extent(rows.flat(), ({x}) => x), width / 90),
      y: {...axis(chart.y_log, chart.whole_y, [low, high], height / 55), nice: !chart.whole_y && !chart.y_log},
      marks,
    };
  }

  function line({look, marked, lonely}, rows) {
    const at = {x: "x", y: "y"};
    const alone = lonely.map((i) => rows[i]);
    return [
      Plot.ruleX(alone, {x: "x", y1: "low", y2: "high", stroke: look.colour, strokeOpacity: 0.5, strokeWidth: 1.5}),
      Plot.areaY(rows, {x: "x", y1: "low", y2: "high", fill: look.colour, fillOpacity: 0.15}),
      Plot.line(rows, {...at, stroke: look.colour, strokeWidth: 2, strokeDasharray: look.dash.join(" ")}),
      Plot.dot(marked.map((i) => rows[i]), {...at, symbol: look.symbol, r: 3.8, fill: look.colour, stroke: "var(--surface)"}),
    ];
  }

  function cloud({look}, rows) {
    return [Plot.dot(rows, {x: "x", y: "y", symbol: look.symbol, r: 3.6, stroke: look.colour, strokeWidth: 1.3})];
  }

  /** Draw one row a series. Rows count from 0 downwards; lengths across them are in pixels of a row's height. */
  function intervals(chart, width) {
    const narrow = width < NARROW;
    const names = chart.series.map(({name}) => broken(name, narrow ? width - 8 : Math.min(260, width * 0.35)));
    const row = narrow ? 44 + 16 * d3.max(names, (lines) => lines.length) : 54;
    const rows = chart.series.map((series, i) => intervalRows(chart, series, i, row));
    const label = narrow
      ? {frameAnchor: "left", textAnchor: "start", lineAnchor: "bottom", dx: 4, dy: -13}
      : {frameAnchor: "left", textAnchor: "end", dx: -12};
    const marks = [
      ...(chart.reference === null ? [] : [Plot.ruleX([chart.reference], REFERENCE)]),
      Plot.text(names, {...label, y: (_, i) => i, text: (lines) => lines.join("\n"), lineHeight: 1.25}),
      ...chart.series.flatMap((series, i) => interval(series, i, row)),
      ...tips(rows.flat()),
    ];
    const domain = narrow ? [-(row - 22) / row, names.length - 1 + 26 / row] : [-0.6, names.length - 0.4];
    return {
      height: row * (domain[1] - domain[0]) + 30,
      marginLeft: narrow ? 4 : widest(names.flat()) + 20,
      marginTop: 4,
      x: {...axis(chart.x_log, chart.whole_x, d3.extent(rows.flat(), ({x}) => x), (narrow ? width : width * 0.65) / 90), nice: !chart.x_log},
      y: {domain, range: [4, row * (domain[1] - domain[0])], axis: null},
      marks,
    };
  }

  function intervalRows({range_label, inner_label}, {name, x, low, high, inner, center}, i, row) {
    const lines = [name];
    if (center !== null) lines.push(`mean: ${number(center)}`);
    if (low.length) lines.push(`${range_label}: ${range(low[0], high[0])}`);
    if (inner) lines.push(`${inner_label}: ${range(...inner)}`);
    const seeds = x.map((value) => ({x: value, y: i + 15 / row, text: `${name}\nsingle seed: ${number(value)}`}));
    const middle = center ?? (low.length ? (low[0] + high[0]) / 2 : null);
    return middle === null ? seeds : [{x: middle, y: i, text: lines.join("\n")}, ...seeds];
  }

  function interval({x, low, high, inner, center, look}, i, row) {
    const stroke = {stroke: look.colour};
    const ends = [...low, ...high];
    const marks = [Plot.dot(x, {x: Plot.identity, y: () => i + 15 / row, r: 2.8, ...stroke, strokeWidth: 1.3})];
    if (ends.length) {
      marks.push(Plot.ruleY([ends], {y: i, x1: "0", x2: "1", ...stroke, strokeWidth: 1.5}));
      marks.push(Plot.ruleX(ends, {y1: i - 6 / row, y2: i + 6 / row, ...stroke, strokeWidth: 1.5}));
    }
    if (inner) marks.push(Plot.ruleY([inner], {y: i, x1: "0", x2: "1", ...stroke, strokeWidth: 5}));
    if (center !== null) {
      const mark = {symbol: look.symbol, r: 6, fill: look.colour, stroke: "var(--surface)"};
      marks.push(Plot.dot([center], {x: Plot.identity, y: () => i, ...mark}));
    }
    if (!x.length && !ends.length && center === null) {
      marks.push(Plot.text(["no data"], {frameAnchor: "middle", y: () => i, fillOpacity: 0.75}));
    }
    return marks;
  }

  function axis(log, whole, extent, count) {
    const shared = {type: log ? "log" : "linear", grid: true, label: null, tickFormat: tick};
    // With base 10, d3 leaves out the labels of some of the ticks that it is given.
    if (log) return {...shared, base: 2, ticks: logTicks(extent, count)};
    if (!whole) return {...shared, ticks: Math.max(3, Math.round(count))};
    return {...shared, ticks: d3.ticks(...extent, Math.max(2, count)).filter(Number.isInteger)};
  }

  /** Pick powers of ten, with their double and fivefold if there are few of them; evenly spaced ones if those are few. */
  function logTicks([low, high], count) {
    const tens = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1).map((power) => 10 ** power);
    const within = (ticks) => ticks.filter((at) => at >= low && at <= high);
    const powers = within(tens);
    if (powers.length > 3) return powers.filter((_, i) => i % Math.ceil(powers.length / count) === 0);
    const fine = within(tens.flatMap((ten) => [ten, 2 * ten, 5 * ten]));
    return fine.length > 3 ? fine : d3.ticks(low, high, count);
  }

  const tickTexts = (svg, which) =>
    d3.selectAll(svg.querySelectorAll(`[aria-label="${which}-axis tick label"] text`)).nodes().map((text) => text.textContent);

  /** Draw once to learn how long the labels of the ticks are, and again with the room they need. */
  function draw(chart, width) {
    const style = {fontFamily: "inherit", fontSize: `${TEXT}px`, background: "none"};
    const options = {width, style, marginTop: 10, marginBottom: 26, inset: 6, ...(chart.kind === "intervals" ? intervals : points)(chart, width)};
    const trial = Plot.plot(options);
    const svg = Plot.plot({
      marginLeft: widest(tickTexts(trial, "y")) + 14,
      marginRight: widest(tickTexts(trial, "x")) / 2 + 4,
      ...options,
    });
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${chart.title}. ${chart.description}`);
    return svg;
  }

  function setUp(place) {
    const chart = charts[Number(place.dataset.chart)];
    if (chart.empty) return;
    const drawing = element("div", {class: "drawing"});
    place.append(...legend(chart));
    if (chart.kind !== "intervals") place.append(element("p", {}, chart.y_title));
    place.append(drawing, element("p", {class: "along-x"}, chart.x_title));
    let drawn = 0;
    const redraw = () => {
      const width = Math.floor(drawing.clientWidth);
      if (width === 0 || width === drawn) return;
      drawn = width;
      drawing.replaceChildren(draw(chart, width));
    };
    redraw();
    new ResizeObserver(() => requestAnimationFrame(redraw)).observe(drawing);
  }

  const charts = JSON.parse(document.getElementById("charts").textContent);
  document.querySelectorAll("[data-chart]").forEach(setUp);
})();
