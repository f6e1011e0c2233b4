"""The style sheet: colours that differ in lightness as well as in hue, light and dark, on paper and on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --ink: #1b2430; --soft: #566272; --line: #d5dae1; --track: #dfe4ea;
  --main: #1f66b3; --second: #b4570c; --third: #0f7a5f; --fourth: #6b7686; --bad: #a8202d; --bad-back: #fdeff0; --good: #0f6b4d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181e; --card: #1c222a; --ink: #e6eaf0; --soft: #a3aebb; --line: #343d49; --track: #2f3844;
    --main: #6cabf0; --second: #f0a35e; --third: #4fc3a1; --fourth: #8e9aaa; --bad: #ff9aa2; --bad-back: #3a2024; --good: #6fd3ac;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header.top, nav, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header.top { padding-top: 28px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 16px; margin: 22px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 13px; margin: 14px 0 4px; color: var(--soft); font-weight: 600; }
p { margin: 6px 0; max-width: 78ch; }
a { color: var(--main); }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; padding-top: 10px; font-size: 14px; }
.soft, figcaption, .none { color: var(--soft); }
.none { font-style: italic; white-space: nowrap; }
.small, figcaption { font-size: 13px; } p.small { max-width: 110ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 18px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b .none { font-size: 16px; font-weight: 400; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.banner { border: 1px solid var(--bad); background: var(--bad-back); border-radius: 8px; padding: 10px 14px; margin: 18px 0; }
.banner ul, .checks { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
.bad { color: var(--bad); } .good { color: var(--good); }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 500; }
thead th { white-space: nowrap; color: var(--soft); font-size: 12.5px; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
table.headline { width: 100%; } table.headline tbody th { min-width: 100px; font-weight: 600; }
table.headline tbody th, table.headline thead th:first-child { position: sticky; left: 0; background: var(--page); }
table.headline small { display: block; color: var(--soft); font-weight: 400; font-size: 12px; }
table.detail tbody tr + tr > * { border-top: 0; } table.detail tr.end > * { border-bottom: 1px solid var(--line); }
table.detail th, table.detail td { padding-top: 2px; padding-bottom: 2px; } table.detail .deep { padding-left: 18px; color: var(--soft); }
table.timing { width: 100%; } td.bar { min-width: 150px; width: 40%; vertical-align: middle; }
svg { display: block; max-width: 100%; } svg text { fill: var(--ink); font-size: 11px; } svg .faint { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg .curve { fill: none; stroke-width: 1.9; stroke-linejoin: round; } svg .dashed { stroke-dasharray: 6 4; }
.c1 { stroke: var(--main); fill: var(--main); } .c2 { stroke: var(--second); fill: var(--second); }
.c3 { stroke: var(--third); fill: var(--third); } .c4 { stroke: var(--fourth); fill: var(--fourth); }
svg text.c1, svg text.c2, svg text.c3, svg text.c4 { stroke: var(--page); stroke-width: 3; paint-order: stroke; font-weight: 600; }
svg text.c1 { fill: var(--main); } svg text.c2 { fill: var(--second); } svg text.c3 { fill: var(--third); }
svg text.c4 { fill: var(--fourth); }
svg .hover { fill: transparent; stroke: none; } svg .hover:hover { fill: var(--ink); fill-opacity: .09; }
svg rect.c1, svg rect.c2, svg rect.c3, svg rect.c4 { stroke: none; }
svg .track { fill: var(--track); } svg .kept { fill: var(--main); }
svg .gone { fill: none; stroke: var(--fourth); stroke-width: 1.2; stroke-dasharray: 2 2; }
svg .tick { fill: var(--ink); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
.swatch svg { width: 10px; height: 10px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 8px 20px; }
figure { margin: 6px 0; } figure > b { font-size: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 0 36px; align-items: start; }
table.structure td { vertical-align: middle; white-space: nowrap; } table.structure svg { max-width: none; }
table.structure .count { display: inline-block; min-width: 40px; margin-left: 8px; color: var(--soft);
  vertical-align: middle; font-size: 13px; }
table.structure svg { display: inline-block; vertical-align: middle; }
.meter { display: inline-block; width: 130px; vertical-align: middle; }
.story { display: grid; grid-template-columns: minmax(0, auto) minmax(0, 1fr); gap: 24px; align-items: start; }
.graph { position: sticky; top: 12px; } .stacked .graph { position: static; margin-bottom: 18px; } .stacked svg { max-width: none; }
.graph a { text-decoration: none; } .graph .box { fill: var(--card); stroke: var(--line); stroke-width: 1.2; }
.graph a:hover .box { stroke: var(--main); } .graph .final { stroke: var(--main); stroke-width: 2; }
.graph .lost { stroke: var(--bad); stroke-dasharray: 4 3; }
.graph .name { font-weight: 600; font-size: 12.5px; }
.graph .edge { fill: none; stroke: var(--soft); stroke-width: 1.5; } .graph .teaches { stroke: var(--second); stroke-dasharray: 5 4; }
.graph .head { fill: var(--soft); } .graph .teaches-head { fill: var(--second); }
article { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; margin: 0 0 14px; background: var(--card); }
article h3 { margin: 0; } article table { font-size: 13px; } article th, article td { padding-top: 3px; padding-bottom: 3px; }
table code { white-space: nowrap; }
table.settings td:nth-child(2), table.data tbody th { overflow-wrap: anywhere; min-width: 96px; }
article:target { outline: 2px solid var(--main); }
.facts { display: flex; flex-wrap: wrap; gap: 2px 22px; margin: 4px 0; font-size: 13.5px; } .facts span { color: var(--soft); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--main); font-size: 14px; }
footer { margin-top: 40px; padding-bottom: 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 760px) {
  main, header.top, nav, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 23px; } .story { grid-template-columns: minmax(0, 1fr); } .graph { position: static; }
  th, td { padding-right: 10px; } table.structure thead th { white-space: normal; }
  .meter { display: block; width: 84px; } table.structure .count { display: block; margin-left: 0; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); } .tile b { font-size: 21px; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --track: #ddd; --main: #1f66b3;
    --second: #b4570c; --third: #0f7a5f; --fourth: #6b7686; --bad: #a8202d; --bad-back: #fff; --good: #0f6b4d; }
  body, table, p.small, .facts, article table { font-size: 11px; }
  nav { display: none; } .wide { overflow: visible; } .graph { position: static; }
  article, figure, tr, .tile { break-inside: avoid; } h2, h3 { break-after: avoid; }
  svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
