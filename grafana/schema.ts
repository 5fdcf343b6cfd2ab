// What Grafana's own types say of a board as JSON. `tsc --strict --noEmit` reads it with the boards below.
import type * as schema from "@grafana/schema";
import type { Options as BarGauge } from "./node_modules/@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type { Options as Stat } from "./node_modules/@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as TimelineField,
  Options as Timeline,
} from "./node_modules/@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type {
  FieldConfig as TableField,
  Options as Table,
} from "./node_modules/@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type {
  FieldConfig as SeriesField,
  Options as Series,
} from "./node_modules/@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// An enum of words is written as one of its words.
type Wire<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Wire<T[K]> } : T;

// Prometheus' queries are not in the package; these are the fields that a board may use of them.
interface Target {
  datasource: schema.DataSourceRef;
  expr: string;
  refId: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
  exemplar?: boolean;
  format?: "table";
}
interface Mark extends Omit<schema.AnnotationQuery, "target"> {
  expr: string;
  step: string;
  titleFormat: string;
  textFormat: string;
}
type Defaults<F> = Omit<schema.FieldConfig, "custom"> & { custom?: Partial<F> };
type Shown<T extends string, O, F> = Omit<schema.Panel, "type" | "options" | "targets" | "fieldConfig"> & {
  type: T;
  options: Partial<O>;
  targets: Target[];
  fieldConfig: { defaults: Defaults<F>; overrides: schema.FieldConfigSource["overrides"] };
};
type AnyPanel =
  | Shown<"timeseries", Series, SeriesField>
  | Shown<"state-timeline", Timeline, TimelineField>
  | Shown<"stat", Stat, never>
  | Shown<"bargauge", BarGauge, never>
  | Shown<"table", Table, TableField>
  | Omit<schema.RowPanel, "panels"> & { panels: [] };
type Board = Wire<
  Omit<schema.Dashboard, "panels" | "annotations"> & { panels: AnyPanel[]; annotations?: { list?: Mark[] } }
>;
