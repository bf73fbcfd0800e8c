//! Arrow cells as text and as JSON values, for the types that tables of texts have.

use std::borrow::Cow;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowDictionaryKeyType, Date32Type, Date64Type, Decimal128Type, Float16Type, Float32Type, Float64Type, Int8Type,
    Int16Type, Int32Type, Int64Type, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType};
use arrow_schema::{DataType, TimeUnit};
use serde_json::{Map, Value};

/// All cells of a column as text.
pub(super) fn texts<'a>(array: &'a ArrayRef, column: &str) -> Result<Vec<Option<Cow<'a, str>>>, String> {
    match array.data_type() {
        DataType::Utf8 => Ok(array.as_string::<i32>().iter().map(|cell| cell.map(Cow::Borrowed)).collect()),
        DataType::LargeUtf8 => Ok(array.as_string::<i64>().iter().map(|cell| cell.map(Cow::Borrowed)).collect()),
        DataType::Utf8View => Ok(array.as_string_view().iter().map(|cell| cell.map(Cow::Borrowed)).collect()),
        _ => Ok(values(array, column)?
            .into_iter()
            .map(|value| match value {
                Value::Null => None,
                Value::String(text) => Some(Cow::Owned(text)),
                other => Some(Cow::Owned(other.to_string())),
            })
            .collect()),
    }
}

/// All cells of a column as JSON values.
pub(super) fn values(array: &ArrayRef, column: &str) -> Result<Vec<Value>, String> {
    (0..array.len())
        .map(|row| {
            value(array.as_ref(), row).map_err(|kind| {
                format!(
                    "column {column:?} holds {kind}, which has no text form\n  hint: drop the column, or write Parquet"
                )
            })
        })
        .collect()
}

/// One cell; the error is the type that is not supported.
fn value(array: &dyn Array, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    fn integer<T: ArrowPrimitiveType>(array: &dyn Array, row: usize) -> i64
    where
        T::Native: Into<i64>,
    {
        array.as_primitive::<T>().value(row).into()
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Int8 => integer::<Int8Type>(array, row).into(),
        DataType::Int16 => integer::<Int16Type>(array, row).into(),
        DataType::Int32 => integer::<Int32Type>(array, row).into(),
        DataType::Int64 => integer::<Int64Type>(array, row).into(),
        DataType::UInt8 => integer::<UInt8Type>(array, row).into(),
        DataType::UInt16 => integer::<UInt16Type>(array, row).into(),
        DataType::UInt32 => integer::<UInt32Type>(array, row).into(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float16 => f64::from(array.as_primitive::<Float16Type>().value(row)).into(),
        // Through text, so that 0.1 as f32 stays "0.1".
        DataType::Float32 => {
            array.as_primitive::<Float32Type>().value(row).to_string().parse::<f64>().unwrap_or(f64::NAN).into()
        }
        DataType::Float64 => array.as_primitive::<Float64Type>().value(row).into(),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value_as_string(row).into(),
        DataType::Date32 => date(i64::from(array.as_primitive::<Date32Type>().value(row))).into(),
        DataType::Date64 => instant(array.as_primitive::<Date64Type>().value(row), 1_000).into(),
        DataType::Timestamp(unit, zone) => {
            let (value, scale) = match unit {
                TimeUnit::Second => (array.as_primitive::<TimestampSecondType>().value(row), 1),
                TimeUnit::Millisecond => (array.as_primitive::<TimestampMillisecondType>().value(row), 1_000),
                TimeUnit::Microsecond => (array.as_primitive::<TimestampMicrosecondType>().value(row), 1_000_000),
                TimeUnit::Nanosecond => (array.as_primitive::<TimestampNanosecondType>().value(row), 1_000_000_000),
            };
            // With a zone the value is UTC, without one it is a clock time.
            let end = if zone.is_some() { "Z" } else { "" };
            format!("{}{end}", instant(value, scale)).into()
        }
        DataType::Dictionary(key, _) => match key.as_ref() {
            DataType::Int8 => dictionary::<Int8Type>(array, row)?,
            DataType::Int16 => dictionary::<Int16Type>(array, row)?,
            DataType::Int32 => dictionary::<Int32Type>(array, row)?,
            DataType::Int64 => dictionary::<Int64Type>(array, row)?,
            DataType::UInt8 => dictionary::<UInt8Type>(array, row)?,
            DataType::UInt16 => dictionary::<UInt16Type>(array, row)?,
            DataType::UInt32 => dictionary::<UInt32Type>(array, row)?,
            _ => return Err(array.data_type().to_string()),
        },
        DataType::List(_) => list(array.as_list::<i32>().value(row).as_ref())?,
        DataType::LargeList(_) => list(array.as_list::<i64>().value(row).as_ref())?,
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(row).as_ref())?,
        DataType::Struct(fields) => {
            let columns = array.as_struct();
            let mut object = Map::new();
            for (field, column) in fields.iter().zip(columns.columns()) {
                object.insert(field.name().clone(), value(column.as_ref(), row)?);
            }
            Value::Object(object)
        }
        other => return Err(other.to_string()),
    })
}

fn dictionary<K: ArrowDictionaryKeyType>(array: &dyn Array, row: usize) -> Result<Value, String> {
    let dictionary = array.as_dictionary::<K>();
    match dictionary.key(row) {
        Some(key) if key < dictionary.values().len() => value(dictionary.values().as_ref(), key),
        _ => Ok(Value::Null),
    }
}

fn list(items: &dyn Array) -> Result<Value, String> {
    (0..items.len()).map(|index| value(items, index)).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

/// `2024-02-29` from days since 1970.
fn date(days: i64) -> String {
    // Years, months and days out of 400-year cycles that begin on 1 March (the inverse of `split::days_from_civil`).
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// `2024-02-29T12:30:00.5` from a count of `1/scale` seconds since 1970.
fn instant(value: i64, scale: i64) -> String {
    let seconds = value.div_euclid(scale);
    let fraction = value.rem_euclid(scale);
    let clock = seconds.rem_euclid(86_400);
    let mut text =
        format!("{}T{:02}:{:02}:{:02}", date(seconds.div_euclid(86_400)), clock / 3600, clock / 60 % 60, clock % 60);
    if fraction != 0 {
        let digits = format!("{:0width$}", fraction, width = scale.ilog10() as usize);
        text.push('.');
        text.push_str(digits.trim_end_matches('0'));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::builder::{ListBuilder, StringBuilder, StringDictionaryBuilder};
    use arrow_array::{BinaryArray, Float32Array, Int64Array, TimestampMillisecondArray};
    use std::sync::Arc;

    #[test]
    fn cells() {
        let column = |array: ArrayRef| values(&array, "c").unwrap();
        assert_eq!(column(Arc::new(Int64Array::from(vec![Some(-3), None]))), [Value::from(-3), Value::Null]);
        assert_eq!(column(Arc::new(Float32Array::from(vec![0.1]))), [Value::from(0.1)]);
        let times = TimestampMillisecondArray::from(vec![1_709_209_800_500, -1]).with_timezone("UTC");
        assert_eq!(column(Arc::new(times)), ["2024-02-29T12:30:00.5Z", "1969-12-31T23:59:59.999Z"]);
        let mut words = StringDictionaryBuilder::<Int32Type>::new();
        words.append_value("up");
        words.append_null();
        words.append_value("up");
        assert_eq!(column(Arc::new(words.finish())), [Value::from("up"), Value::Null, Value::from("up")]);
        let mut lists = ListBuilder::new(StringBuilder::new());
        lists.append_value([Some("a"), None]);
        assert_eq!(column(Arc::new(lists.finish())), [serde_json::json!(["a", null])]);
        let binary: ArrayRef = Arc::new(BinaryArray::from(vec![&b"x"[..]]));
        assert!(values(&binary, "raw").unwrap_err().contains("column \"raw\" holds Binary"));
    }

    #[test]
    fn dates_are_the_inverse_of_days() {
        for day in [-700_000, -1, 0, 59, 60, 11_016, 19_782, 2_932_896] {
            let text = date(day);
            assert_eq!(crate::split::parse_time(&text).map(|seconds| (seconds / 86_400.0) as i64), Some(day), "{text}");
        }
    }
}
