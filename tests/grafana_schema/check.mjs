// Usage: node check.mjs BOARD.json… Exit code 0 where Grafana's own TypeScript types of dashboards, panels, and each panel kind's
// options and field settings take the file: right names, right types, nothing unknown.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import ts from "typescript";

const here = dirname(fileURLToPath(import.meta.url));
const raw = "@grafana/schema/dist/types/raw";
const kinds = { timeseries: "TimeSeries", heatmap: "Heatmap", stat: "Stat", table: "Table" };

const lines = [
  `import type * as dashboard from "${raw}/dashboard/x/dashboard_types.gen.d.ts";`,
  ...Object.entries(kinds).map(
    ([kind, name]) => `import type * as ${kind} from "${raw}/composable/${kind}/panelcfg/x/${name}PanelCfg_types.gen.d.ts";`,
  ),
  // JSON has an enum's values, not its members.
  "type Plain<T> = T extends string ? `${T}` : T extends number ? (`${T}` extends `${infer N extends number}` ? N : number)",
  "  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;",
];
const origins = [];
let count = 0;

function typed(type, value, origin) {
  origins[lines.length] = origin;
  lines.push(`export const v${count++}: Plain<${type}> = ${JSON.stringify(value)};`);
}

for (const file of process.argv.slice(2)) {
  const { panels, ...board } = JSON.parse(readFileSync(file, "utf8"));
  typed("dashboard.Dashboard", board, file);
  for (const panel of panels) {
    const origin = `${file}: ${panel.title}`;
    if (panel.type === "row") {
      typed("dashboard.RowPanel", panel, origin);
      continue;
    }
    if (!(panel.type in kinds)) throw new Error(`${origin}: no types for a ${panel.type} panel here`);
    typed("dashboard.Panel", panel, origin);
    if (panel.options) typed(`Partial<${panel.type}.Options>`, panel.options, `${origin}, options`);
    const custom = panel.fieldConfig?.defaults?.custom;
    if (custom && panel.type !== "stat") typed(`Partial<${panel.type}.FieldConfig>`, custom, `${origin}, field settings`);
  }
}

const name = join(here, "boards.ts");
const options = {
  noEmit: true,
  strict: true,
  skipLibCheck: true,
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  target: ts.ScriptTarget.ES2022,
  types: [],
};
const host = ts.createCompilerHost(options);
const source = ts.createSourceFile(name, lines.join("\n"), options.target);
const read = host.getSourceFile.bind(host);
host.getSourceFile = (path, ...rest) => (path === name ? source : read(path, ...rest));
const problems = ts.getPreEmitDiagnostics(ts.createProgram([name], options, host));
for (const problem of problems) {
  const line = problem.file?.fileName === name ? ts.getLineAndCharacterOfPosition(problem.file, problem.start).line : -1;
  console.error(`${origins[line] ?? "check.mjs"}: ${ts.flattenDiagnosticMessageText(problem.messageText, "\n  ")}`);
}
console.log(`${count} values, ${problems.length} problems`);
process.exit(problems.length ? 1 : 0);
