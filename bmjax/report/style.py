"""The page's style sheet. Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4;
  --big: #0072b2; --small: #d55e00; --tint: #fdf1e7; --allowed: #e3f0f8; --beyond: #eceef0; --hollow: #b6bec7; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1318; --card: #181d24; --ink: #e8ecf0; --soft: #9aa6b2; --rule: #303842;
  --big: #56b4e9; --small: #f0914a; --tint: #2a221b; --allowed: #1a2f3d; --beyond: #232a32; --hollow: #4c5661; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
header p, .soft, footer { color: var(--soft); }
header p { margin: 0; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
section > p:first-of-type { margin-top: 0; }
a { color: var(--big); }
.verdict { border-left: 6px solid var(--soft); display: grid;
  grid-template-columns: minmax(0, 1fr) minmax(0, 460px); gap: 8px 32px; align-items: center; }
.verdict.good { border-left-color: var(--big); }
.verdict.bad { border-left-color: var(--small); }
.verdict h2 { font-size: 1.75rem; line-height: 1.2; margin-bottom: 10px; text-wrap: balance; }
.verdict p { margin: 0 0 8px; }
.verdict > :only-child { grid-column: 1 / -1; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.cards div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.cards b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650; }
.cards span { display: block; }
.cards .soft { font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--hollow); vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; font-weight: 400; color: var(--soft); }
tbody tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; }
table:has(thead th:nth-child(2):last-child) { max-width: 420px; }
td small, .part small { display: block; color: var(--soft); font-size: .8rem; }
.product { background: var(--tint); }
td.product { font-weight: 600; }
td.product small { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 14px 0 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--page); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 6px 0 14px;
  color: var(--soft); font-size: .9rem; align-items: center; }
.key svg { display: inline-block; vertical-align: -2px; margin-right: 6px; }
.layer { display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 4px 16px;
  padding: 9px 0; border-top: 1px solid var(--rule); }
.layer .parts { display: flex; flex-wrap: wrap; gap: 8px 28px; }
.layer.removed b { text-decoration: line-through; font-weight: 400; }
.layer.removed, .layer.removed b { color: var(--soft); }
.part { margin: 0; max-width: 100%; }
.layer small { display: block; color: var(--soft); font-size: .85rem; }
.panels svg { width: 100%; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 18px 24px; }
.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 18px 24px; }
.beside { display: flex; flex-wrap: wrap; gap: 16px 32px; align-items: start; }
.beside > .scroll { flex: 1 1 auto; max-width: 100%; } .beside > figure { flex: 1 1 320px; }
.verdict > svg, .beside > figure > svg { width: 100%; max-width: 460px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 2px; }
svg { display: block; max-width: 100%; height: auto; font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg.fixed { max-width: none; }
svg text { fill: var(--ink); }
svg text.label { fill: var(--soft); }
svg text.strong { font-weight: 600; }
.allowed { fill: var(--allowed); } .beyond { fill: var(--beyond); }
.axis { stroke: var(--soft); } .grid { stroke: var(--rule); }
.zero { stroke: var(--soft); stroke-dasharray: 3 3; } .limit { stroke: var(--ink); stroke-width: 2; }
.whisker { stroke: var(--small); stroke-width: 3; fill: none; }
.line { fill: none; stroke-linejoin: round; } .line.train { stroke: var(--big); stroke-width: 1.2; }
.line.valid { stroke: var(--small); stroke-width: 2; }
.dot.small, .dot.valid { fill: var(--small); } .dot.train { fill: var(--big); }
.dot.failed { fill: var(--card); stroke: var(--soft); stroke-width: 1.5; }
.ring { fill: none; stroke: var(--small); stroke-width: 1.5; }
.kept, .gone { fill: none; stroke: var(--big); } .gone { stroke: var(--rule); } .amount { fill: var(--soft); }
.right { fill: var(--big); } .wrong { fill: var(--small); } .none { fill: var(--page); }
@media screen and (max-width: 760px) {
  main { padding: 16px 10px 40px; }
  section { padding: 16px 14px; }
  .verdict, .layer { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards div:first-child:nth-last-child(odd) { grid-column: 1 / -1; }
  .cards b { font-size: 1.35rem; }
  table { font-size: .85rem; }
  th, td { padding: 5px 4px; }
  td small { font-size: .72rem; }
  .scroll th:first-child { position: sticky; left: 0; background: var(--card); }
}
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc; --big: #0072b2;
    --small: #d55e00; --tint: #fdf1e7; --allowed: #e3f0f8; --beyond: #eceef0; --hollow: #b6bec7; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html { font-size: 11px; } main { padding: 0; max-width: none; }
  .verdict { grid-template-columns: minmax(0, 1fr) 300px; }
  .cards { grid-template-columns: repeat(5, 1fr); }
  .panels, .matrices { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
  figure, .layer, .cards, .verdict, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
""".strip()
