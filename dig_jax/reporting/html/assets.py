"""The page's style, in light and dark, and what moves on it; all of it stands in the one file."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #f7f8fa; --card: #ffffff; --ink: #1d2330; --dim: #667085; --edge: #dfe3ea;
  --c0: #1f5fa8; --c1: #d95f02; --c2: #4f9d4a; --c3: #2f8f96; --c4: #7a68b3; --c5: #b0608c; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12151b; --card: #1b2029; --ink: #e4e8ef; --dim: #98a2b3; --edge: #313a48;
  --c0: #6cabf2; --c1: #ff9a4d; --c2: #8fce8a; --c3: #6ccbd2; --c4: #b3a4e6; --c5: #e39ac3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 1500px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0; } .dim, em { color: var(--dim); font-style: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .6rem;
  margin-top: 1rem; }
.tiles div, figure, .box { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .7rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: .8rem; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: .8rem;
  align-items: start; }
.stack { display: grid; gap: .8rem; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; font-weight: 600; }
figcaption em { font-weight: 400; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--dim); font: 10.5px system-ui, sans-serif; }
svg path, svg line { stroke: var(--edge); stroke-width: 1; fill: none; }
svg .axis { stroke: var(--dim); }
svg .mark { stroke: var(--c1); stroke-width: 1.5; stroke-dasharray: 2 3; opacity: .8; }
svg polyline { fill: none; stroke-linejoin: round; }
svg .strong { stroke-width: 1.8; } svg .thin { stroke-width: .9; }
svg .faint { stroke-width: .8; opacity: .35; }
svg .cursor { stroke: var(--dim); visibility: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; color: var(--dim); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.legend b { color: var(--ink); font-weight: 500; margin-left: .4em; font-variant-numeric: tabular-nums; }
.samples { display: flex; gap: .8rem; overflow-x: auto; }
.samples figure { padding: 0; border: 0; flex: none; max-width: 100%; }
.samples img { display: block; max-width: 100%; border-radius: 4px; }
.live .samples figcaption { display: none; }
.live .samples { display: block; }
.live .samples figure:not(.shown) { display: none; }
.slider { display: none; }
.live .slider { display: flex; gap: .8rem; align-items: center; margin-bottom: .6rem; }
.slider input { flex: 1; max-width: 640px; accent-color: var(--c0); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--edge); }
th { font-weight: 500; color: var(--dim); } tr:last-child > * { border: 0; }
td { font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
summary { cursor: pointer; color: var(--dim); margin-top: .6rem; }
"""

# A value under the pointer is that of the nearest point at or before it.
SCRIPT = """
document.body.classList.add('live');
for (const figure of document.querySelectorAll('.chart')) {
  const svg = figure.querySelector('svg'), cursor = figure.querySelector('.cursor');
  const told = figure.querySelector('em'), last = [...figure.querySelectorAll('b')];
  const ends = last.map(b => b.textContent);
  const {x: [low, high, start, end], curves} = JSON.parse(figure.querySelector('script').textContent);
  const nearest = (steps, step) => steps.reduce(
    (best, s, i) => Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best, 0);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (Math.min(Math.max(at, start), end) - start) / (end - start) * (high - low);
    const step = curves[0][0][nearest(curves[0][0], wanted)];
    const place = start + (step - low) / (high - low) * (end - start);
    cursor.setAttribute('x1', place); cursor.setAttribute('x2', place);
    cursor.style.visibility = 'visible';
    told.textContent = 'step ' + step.toLocaleString('en');
    curves.forEach(([steps, values], i) => last[i].textContent = values[nearest(steps, step)]);
  });
  svg.addEventListener('pointerleave', () => {
    cursor.style.visibility = 'hidden'; told.textContent = '';
    ends.forEach((text, i) => last[i].textContent = text);
  });
}
const slider = document.querySelector('.slider input');
if (slider) {
  const shown = [...document.querySelectorAll('.samples figure')];
  const label = document.querySelector('.slider span');
  const show = () => shown.forEach((figure, i) => {
    figure.classList.toggle('shown', i == slider.value);
    if (i == slider.value) label.textContent = figure.querySelector('figcaption').textContent;
  });
  slider.addEventListener('input', show); show();
}
"""
