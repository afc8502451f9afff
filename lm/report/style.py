"""The style sheet of the report: no downloads, light or dark as the reader prefers, printable."""

CSS = """
:root {
  --ink: #1d2430; --soft: #5c6675; --line: #e3e7ed; --page: #f6f7f9; --card: #ffffff;
  --accent: #2f7ed8; --mark: #fff3d6; --warn: #b3261e;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ee; --soft: #98a2b1; --line: #2c333e; --page: #12161c; --card: #1a1f27;
    --accent: #6aa9f0; --mark: #43391d; --warn: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--sans);
  -webkit-font-smoothing: antialiased;
}
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
h1, h2, summary { overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.015em; }
h2 { font-size: 18px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 0; white-space: nowrap; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 22px; }
.card, figure, .box { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: 12px 16px 14px; }
.card .name { font-size: 12px; color: var(--soft); }
.card .value { font-size: 22px; font-weight: 650; line-height: 1.25; white-space: nowrap;
  letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.card .note { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.card.first { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
.card.warn .value { color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 16px 8px; }
figure.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 8px; align-items: baseline;
  margin-bottom: 4px; }
.narrow { display: none; }
.key { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 2px 18px;
  padding: 8px 0; background: var(--page); font-size: 13.5px; }
.named { display: flex; align-items: baseline; }
.named span { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--sans) !important; }
.box { padding: 6px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-top: 1px solid var(--line);
  vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.config td, .config th, code, pre { font-family: var(--mono); font-size: 12.5px; }
.config td { overflow-wrap: anywhere; }
tr.changed > * { background: var(--mark); }
tr.changed > :first-child { box-shadow: inset 3px 0 0 #e0a127; padding-left: 10px; }
.verdicts { display: grid; gap: 8px; }
.verdicts .card .note { font-size: 14px; color: var(--ink); }
.card.warn { border-color: var(--warn); }
.best { font-weight: 700; color: var(--accent); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 12px;
  margin-bottom: 12px; }
.sample { padding: 0; overflow: hidden; }
.sample header { padding: 8px 16px; border-bottom: 1px solid var(--line); font-size: 12.5px;
  color: var(--soft); }
pre { margin: 0; padding: 12px 16px; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.55; }
pre b { color: var(--accent); font-weight: 600; }
.bar { background: var(--line); border-radius: 3px; height: 8px; min-width: 120px;
  margin-top: 6px; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.swatch { flex: none; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; padding: 4px 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 12.5px; }
@media (max-width: 760px) {
  .figures { grid-template-columns: 1fr; }
  .samples { grid-template-columns: 1fr; }
  main { padding: 24px 14px 48px; }
  .broad { display: none; }
  .narrow { display: block; }
  .key { position: static; }
  .card .value { font-size: 19px; white-space: normal; overflow-wrap: anywhere; }
  .bar { min-width: 40px; }
  td, .stacked th, .config th { overflow-wrap: anywhere; }
  .stacked, .stacked tbody, .stacked tr, .stacked th { display: block; }
  .stacked thead { display: none; }
  .stacked tr { padding: 8px 0; border-top: 1px solid var(--line); }
  .stacked tr:first-child { border-top: 0; }
  .stacked th { padding: 0 0 2px; border-top: 0; }
  .stacked td { display: flex; justify-content: space-between; gap: 12px; padding: 1px 0;
    border-top: 0; text-align: right; }
  .stacked td::before { content: attr(data-head); color: var(--soft); text-align: left;
    font-family: var(--sans); flex: none; max-width: 45%; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --page: #fff; --card: #fff; --mark: #f3ead2;
    --accent: #1f5fae; --warn: #900; }
  main { max-width: none; padding: 0; }
  figure, .card, .box, .sample { break-inside: avoid; }
  h2 { break-after: avoid; }
  .key { position: static; }
}
"""
