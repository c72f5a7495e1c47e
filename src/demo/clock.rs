//! The time, and dates counted from it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tower::service_fn;

use super::{arguments, discover, failed, found, list, target, text_resource, unknown};
use crate::{
    BoxError, BoxMcpService, McpService as _,
    protocol::{McpRequest, McpResponse, Method},
};

pub(super) fn service() -> BoxMcpService {
    service_fn(|request: McpRequest| std::future::ready(Ok::<_, BoxError>(answer(&request)))).boxed_mcp()
}

fn answer(request: &McpRequest) -> McpResponse {
    match (request.method(), target(request)) {
        (Method::Discover, _) => discover(
            "portcullis-clock",
            "Tells the time in UTC and counts days.",
            json!({ "tools": {}, "prompts": {}, "resources": {} }),
        ),
        (Method::ToolsList, _) => list("tools", tools()),
        (Method::PromptsList, _) => list("prompts", prompts()),
        (Method::ResourcesList, _) => list("resources", resources()),
        (Method::ToolsCall, "now") => now(),
        (Method::ToolsCall, "add_days") => add_days(request),
        (Method::PromptsGet, "plan_day") => plan_day(request),
        (Method::ResourcesRead, NOW) => text_resource(NOW, &Moment::now().to_string()),
        _ => unknown(request),
    }
}

const NOW: &str = "clock://now";

fn tools() -> Value {
    json!([
        {
            "name": "now",
            "title": "What time is it?",
            "description": "The present date and time, in UTC.",
            "inputSchema": { "type": "object", "additionalProperties": false },
            "outputSchema": {
                "type": "object",
                "properties": { "utc": { "type": "string" }, "unix": { "type": "integer" } },
                "required": ["utc", "unix"],
            },
            "annotations": { "readOnlyHint": true, "openWorldHint": false },
        },
        {
            "name": "add_days",
            "title": "Count days",
            "description": "The date so many days after another; before it, when the number is negative.",
            "inputSchema": {
                "type": "object",
                "properties": {
                    "date": { "type": "string", "description": "YYYY-MM-DD; today when absent" },
                    "days": { "type": "integer", "description": "how many" },
                },
                "required": ["days"],
                "additionalProperties": false,
            },
            "outputSchema": {
                "type": "object",
                "properties": { "date": { "type": "string" }, "weekday": { "type": "string" } },
                "required": ["date", "weekday"],
            },
            "annotations": { "readOnlyHint": true, "idempotentHint": true, "openWorldHint": false },
        },
    ])
}

fn prompts() -> Value {
    json!([{
        "name": "plan_day",
        "title": "Plan a day",
        "description": "Asks for a plan of today.",
        "arguments": [{ "name": "focus", "description": "what matters most", "required": false }],
    }])
}

fn resources() -> Value {
    let description = "The present date and time, in UTC.";
    json!([{ "uri": NOW, "name": "now", "description": description, "mimeType": "text/plain" }])
}

fn now() -> McpResponse {
    let now = Moment::now();
    found(now.to_string(), json!({ "utc": now.to_string(), "unix": now.unix }))
}

fn add_days(request: &McpRequest) -> McpResponse {
    let arguments = arguments(request);
    let Some(days) = arguments.get("days").and_then(Value::as_i64) else {
        return failed("`days` is missing, or no whole number");
    };
    let from = match arguments.get("date") {
        None => Some(Date::of_day(Moment::now().day())),
        Some(date) => date.as_str().and_then(Date::parse),
    };
    let Some(from) = from else {
        return failed("`date` is no date such as 2024-02-29");
    };
    match from.day().checked_add(days).filter(|day| DAYS.contains(day)) {
        Some(day) => {
            let date = Date::of_day(day).to_string();
            let weekday = WEEKDAYS[day.rem_euclid(7) as usize];
            found(format!("{weekday}, {date}"), json!({ "date": date, "weekday": weekday }))
        }
        None => failed("that is not between the years 1 and 9999"),
    }
}

fn plan_day(request: &McpRequest) -> McpResponse {
    let today = Date::of_day(Moment::now().day());
    let focus = match arguments(request).get("focus").and_then(Value::as_str) {
        Some(focus) => format!(" What matters most is: {focus}."),
        None => String::new(),
    };
    let text = format!("Today is {today}. Look at my notes and plan my day.{focus}");
    super::complete(json!({
        "description": "A plan of today",
        "messages": [{ "role": "user", "content": { "type": "text", "text": text } }],
    }))
}

// === time ===

struct Moment {
    unix: i64,
}

impl Moment {
    /// A clock before 1970 says 1970.
    fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { unix: i64::try_from(since.as_secs()).unwrap_or_default() }
    }

    fn day(&self) -> i64 {
        self.unix.div_euclid(DAY)
    }
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.unix.rem_euclid(DAY);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{}T{hour:02}:{minute:02}:{second:02}Z", Date::of_day(self.day()))
    }
}

/// A date of the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    fn parse(text: &str) -> Option<Date> {
        let mut parts = text.splitn(3, '-');
        let mut part = |digits: usize| {
            let text = parts.next().filter(|t| t.len() == digits && t.bytes().all(|b| b.is_ascii_digit()))?;
            text.parse::<i64>().ok()
        };
        let date = Date { year: part(4)?, month: part(2)?, day: part(2)? };
        // A day that is not there comes back as another.
        let exists = (1..=12).contains(&date.month) && Date::of_day(date.day()) == date;
        (exists && DAYS.contains(&date.day())).then_some(date)
    }

    /// Days since 1970-01-01. The year is taken to begin in March, so that the odd day comes last.
    fn day(self) -> i64 {
        let year = if self.month <= 2 { self.year - 1 } else { self.year };
        let month = (self.month + 9) % 12;
        let day_of_year = (153 * month + 2) / 5 + self.day - 1;
        year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - EPOCH
    }

    fn of_day(day: i64) -> Date {
        let day = day + EPOCH;
        let era = day.div_euclid(DAYS_OF_ERA);
        let of_era = day.rem_euclid(DAYS_OF_ERA);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * of_year + 2) / 153;
        let year = year_of_era + era * 400 + i64::from(month >= 10);
        Date { year, month: (month + 2) % 12 + 1, day: of_year - (153 * month + 2) / 5 + 1 }
    }
}

impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

/// Seconds of a day.
const DAY: i64 = 86_400;
/// The calendar repeats after 400 years.
const DAYS_OF_ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// The days of the years 1 to 9999.
const DAYS: std::ops::RangeInclusive<i64> = -719_162..=2_932_896;
/// 1970 began on a Thursday.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_dates_are_the_same_calendar() {
        for (text, day) in [("1970-01-01", 0), ("2000-02-29", 11_016), ("0001-01-01", *DAYS.start())] {
            assert_eq!(Date::parse(text).unwrap().day(), day);
        }
        assert_eq!(Date::of_day(*DAYS.end()).to_string(), "9999-12-31");
        for day in (*DAYS.start()..=*DAYS.end()).step_by(97) {
            assert_eq!(Date::of_day(day).day(), day);
        }
    }

    #[test]
    fn days_that_are_not_there_are_refused() {
        for text in
            ["2023-02-29", "2024-13-01", "2024-00-10", "2024-1-01", "0000-12-31", "x", "", "2024-01-01-"]
        {
            assert_eq!(Date::parse(text), None, "{text}");
        }
    }

    #[test]
    fn no_number_of_days_is_too_much() {
        for days in [i64::MAX, i64::MIN, 10_000_000] {
            let request = McpRequest::call_tool("add_days", json!({ "days": days }));
            assert_eq!(answer(&request).payload().to_value().unwrap()["isError"], true);
        }
    }
}
